"""The mathematics: reflections, compact WY, geodesics, and forms that exporters understand."""
