"""What the commands do: train, defend, evaluate, audit, reactivate, inspect, purify."""
