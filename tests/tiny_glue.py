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
    own: dict = dict.fromkeys(('idx', 'span1_index', 'span2_index'), tf.int32)
    own['label'] = tfds.features.ClassLabel(names=glue.BENCHMARKS[benchmark][config].words)
    fields = next(iter(splits.values()))[0]
    tfds.dataset_builders.store_as_tfds_dataset(
      name=benchmark,
      config=config,
      version=glue._VERSIONS[benchmark],
      features=tfds.features.FeaturesDict(
        {field: own.get(field, tfds.features.Text()) for field in fields}
      ),
      split_datasets={
        split: tf.data.Dataset.from_tensor_slices(
          {field: [example[field] for example in examples] for field in fields}
        )
        for split, examples in splits.items()
      },
      data_dir=str(directory),
    )
