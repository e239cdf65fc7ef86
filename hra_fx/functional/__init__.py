"""The mathematics: reflections, compact WY, geodesics, and variants that exporters support."""
