"""The one exception for a mistake in what a user gave."""


class UserError(ValueError):
  """A mistake in the user's input.

  Its message is one sentence: what was wrong, the value, the allowed, the remedy.

  Commands print the message alone and exit with status 2 (`lex_fire.cli`); in a notebook it is an
  ordinary ValueError. Anything else that is raised is a defect of lex_fire and keeps its traceback.
  """
