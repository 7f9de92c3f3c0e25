"""`ci/campaign`: one campaign over many processes, machines and nights.

`plan` says what there is to do, `shard` does one task of it, `memory` is what the shards tell each other, `on_ray` and
`on_xdist` hand tasks to processes, `journal` keeps what is done, `live` shows it, `summary` reports it; `main` is the driver.
"""
