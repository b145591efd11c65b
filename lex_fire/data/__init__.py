"""The data room: documents, tokens, windows and batches; it knows no model.

`corpora` finds text on this machine, `tasks` turns it into tokens by seqio, `prepare` writes them
to disk once as the flat array of `stream`, `batches` trains from that array, and `protocols` cuts
whole documents into the windows of a length evaluation. `masking` and `positions` change batches by
the random numbers of `draws`. `text` turns tokens back into text as they come. Only `tasks` imports
seqio and TensorFlow, only `batches` imports Grain, and both only inside functions.
"""
