"""What is measured while training: sums over tokens and ranks, the numbers made of them, the table of a validation."""
