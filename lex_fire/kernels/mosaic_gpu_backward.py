"""The backward passes of `mosaic_gpu`."""

def block(channels):
  return 32 if channels == 256 else 64
