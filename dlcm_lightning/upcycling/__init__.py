"""A DLCM, or a dense model of ours, that begins with the weights of a dense model that somebody has trained."""
