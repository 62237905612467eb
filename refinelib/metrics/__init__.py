"""How good masks are: metrics, in the crop and in the image, prediction, results."""
