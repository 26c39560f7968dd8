"""What the server runs: the Flower ServerApp."""
