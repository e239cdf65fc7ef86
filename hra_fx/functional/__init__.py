"""The mathematics: reflections, compact WY, geodesics, LoRA forms, pairs, and the main directions of inputs."""
