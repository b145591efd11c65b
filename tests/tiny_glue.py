"""Tasks of GLUE and SuperGLUE so small that tests make them in a second, as TFDS has them."""

import pathlib

from lex_fire.data import glue

WSC = {
  'text': 'Mark told Pete many lies, which Pete told him.',
  'span1_text': 'Pete',
  'span1_index': 6,
  'span2_text': 'many lies,',
  'span2_index': 3,
}
_WORDS = (('good', 1), ('bad', 0))


def sentence(index: int, label: int | None = None) -> dict:
  """Returns a sentence of one word, which is praise or not, as SST-2 has it."""
  word, right = _WORDS[index % 2]
  return {'sentence': word, 'idx': index, 'label': right if label is None else label}


def option(paragraph: int, question: int, answer: int) -> dict:
  """Returns an option of an answer as MultiRC has it, right if its number is even."""
  return {
    'paragraph': f'<b>Sent 1: </b>Of {paragraph}.<br>So it is.',
    'question': f'{question}?',
    'answer': f'It is {answer}.',
    'idx': {'paragraph': paragraph, 'question': question, 'answer': answer},
    'label': (answer + 1) % 2,
  }


def query(index: int, *answers: str) -> dict:
  """Returns a query as ReCoRD has it."""
  return {
    'passage': f'It was {index}.\n@highlight\nAll went\n@highlight\nNone came',
    'query': f'{index} went to @placeholder.',
    'entities': ['New York', 'Oslo', 'the Hague'],
    'answers': list(answers),
    'idx': {'passage': 2, 'query': index},
  }


# {config of TFDS: {split: examples}}; a label of -1 is withheld.
ROWS = {
  'glue/sst2': {
    'train': [sentence(index) for index in range(32)],
    'validation': [sentence(index) for index in range(4)],
    'test': [sentence(index, -1) for index in (2, 10, 9)],
  },
  'glue/mnli': {
    name: [{'hypothesis': 'A.', 'premise': f'In {name}.', 'idx': 0, 'label': 0}]
    for name in glue.GLUE['mnli'].splits.values()
  },
  'super_glue/multirc': {
    'validation': [option(3, 1, 10), option(3, 1, 9), option(3, 2, 0), option(12, 30, 0)],
    'test': [{**option(3, 1, 10), 'label': -1}, {**option(3, 1, 9), 'label': -1}],
  },
  'super_glue/record': {
    'train': [query(5), query(6, 'Oslo'), query(7, 'New York', 'the Hague')],
    'test': [query(10), query(9)],
  },
  'super_glue/wsc.fixed': {
    'validation': [{**WSC, 'idx': 4, 'label': 0}, {**WSC, 'idx': 5, 'label': -1}]
  },
}


def write(directory: pathlib.Path) -> None:
  """Writes the datasets of ROWS with the features of TFDS' own."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  for name, splits in ROWS.items():
    benchmark, _, config = name.partition('/')
    features = _feature(next(iter(splits.values()))[0], glue.BENCHMARKS[benchmark][config].words)
    tfds.dataset_builders.store_as_tfds_dataset(
      name=benchmark,
      config=config,
      version=glue._VERSIONS[benchmark],
      features=features,
      split_datasets={
        split: tf.data.Dataset.from_generator(
          examples.__iter__, output_signature=features.get_tensor_spec()
        )
        for split, examples in splits.items()
      },
      data_dir=str(directory),
    )


def _feature(value: object, words: tuple[str, ...] | None):
  """Returns the feature of TFDS that a value is of; of labels of some words among its fields."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  if isinstance(value, dict):
    fields = {field: _feature(inner, words) for field, inner in value.items()}
    labels = {'label': tfds.features.ClassLabel(names=words)} if 'label' in value else {}
    return tfds.features.FeaturesDict(fields | labels)
  if isinstance(value, list):
    return tfds.features.Sequence(tfds.features.Text())
  return tfds.features.Text() if isinstance(value, str) else tf.int32
