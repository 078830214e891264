"""What a hospital does in a round: decide, train, evaluate, disclose."""
