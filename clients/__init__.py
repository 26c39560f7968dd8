"""What a data owner runs: the Flower ClientApp."""
