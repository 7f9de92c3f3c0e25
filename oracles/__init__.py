"""What each transform must do: cases, contracts and slow oracles, one module per family."""
