"""What the seven scripts use and nobody needs to read first."""
