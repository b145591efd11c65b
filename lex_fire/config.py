"""What a run is, as frozen dataclasses.

The only door through which a ConfigDict enters the library. Every default lives here and nowhere
else. Units are in the comments.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lex_fire import encodings, errors, kernels, rematerialization
from lex_fire.data import protocols
from lex_fire.data import spec as spec_lib
from lex_fire.kernels import decay, ring
from lex_fire.kernels import mask as mask_lib

ACTIVATIONS, NORMS = ('gelu', 'swiglu'), ('layernorm', 'rmsnorm')
DTYPES = ('float32', 'bfloat16')
AS_TRAINED = 'as_trained'  # in `evaluate`: what the run itself has
MOST = 2**31 - 1  # that an int32 counts
LATEST, BEST = 'latest', 'best'  # in `evaluate`: checkpoints of a run


def _choice(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise errors.UserError(f'unknown {name}={value!r}; known: {", ".join(known)}')


def _at_least(least: int, **values: int) -> None:
  for name, value in values.items():
    if value < least:
      raise errors.UserError(f'{name}={value} must be at least {least}')
    if value > MOST:
      raise errors.UserError(f'{name}={value} must be at most {MOST}')


def _check(ok: bool, allowed: str, **values: Any) -> None:
  """Refuses the one named value unless `ok`; a comparison with NaN is not."""
  if not ok:
    ((name, value),) = values.items()
    raise errors.UserError(f'{name}={value} must be {allowed}')


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
  """A name of `encodings.ENCODINGS` with the options of its factory."""

  name: str = 'fire'
  options: tuple[tuple[str, Any], ...] = ()  # sorted (option, value) pairs, so that it hashes

  def make(self) -> encodings.Encoding:
    """Makes the encoding; raises errors.UserError for an unknown name or option."""
    return encodings.get(self.name, **dict(self.options))

  def replaced_by(self, text: str, train_length: int) -> 'EncodingConfig':
    """Reads an encoding that is to stand in the place of this one, which a model was trained with.

    Args:
      text: NAME or NAME:OPTION=VALUE,OPTION=VALUE, or as_trained: this one itself. Options that are
        not given stay as trained where this encoding has them too (a rotation's base_period and
        pairing), and an option train_length is the model's.
      train_length: of the model's training windows [tokens].

    Raises:
      errors.UserError: for an unknown name or option, or a value of another type.
    """
    if text == AS_TRAINED:
      return self
    name, _, arg = text.partition(':')
    known = encodings.options(name)
    trained = {**encodings.options(self.name), **dict(self.options), 'train_length': train_length}
    options = {option: trained.get(option, default) for option, default in known.items()}
    for part in filter(None, arg.split(',')):
      option, _, value = part.partition('=')
      if option not in known:
        encodings.get(name, **{option: value})  # says what it takes
      options[option] = _read(option, value, name, like=known[option])
    return EncodingConfig(name, tuple(sorted(options.items())))


def _read(option: str, text: str, name: str, like: Any) -> Any:
  """Reads the value of an option of encoding `name`, of the type of its default `like`."""
  try:
    if isinstance(like, bool):
      return {'true': True, 'false': False}[text.lower()]
    return like.__class__(text)
  except (KeyError, ValueError) as error:
    raise errors.UserError(
      f'encoding option {option}={text} of {name!r} must be of type {like.__class__.__name__}'
    ) from error


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A model's shape."""

  num_layers: int = 4
  d_model: int = 128  # channels of the residual stream
  num_heads: int = 4  # heads of queries
  num_kv_heads: int = 4  # heads of keys and values; divides num_heads (grouped-query attention)
  head_dim: int = 32  # channels a head
  d_ff: int = 512  # hidden units of the MLP
  vocab_size: int = 259  # ids of the Task's vocabulary
  activation: str = 'gelu'  # one of ACTIVATIONS; swiglu has a third matrix of d_ff columns
  norm: str = 'layernorm'  # one of NORMS
  causal: bool = True  # predicts the next token; False: an encoder that restores masked ones
  tied_embeddings: bool = True  # logits from the token embeddings, or from a matrix of their own
  scan_layers: bool = False  # one compiled block for all: compiles fast, 1.3 times slower on CPU
  remat: str = 'none'  # what the backward pass computes again: a key of rematerialization.POLICIES
  dtype: str = 'float32'  # of activations; parameters are always float32
  attention: str = 'auto'  # a key of kernels.IMPLEMENTATIONS, or auto

  def __post_init__(self):
    _choice('model.activation', self.activation, ACTIVATIONS)
    _choice('model.norm', self.norm, NORMS)
    _choice('model.dtype', self.dtype, DTYPES)
    _choice('model.remat', self.remat, tuple(rematerialization.POLICIES))
    _choice('model.attention', self.attention, ('auto', *kernels.IMPLEMENTATIONS))
    sizes = ('num_layers', 'd_model', 'num_heads', 'num_kv_heads', 'head_dim', 'd_ff', 'vocab_size')
    _at_least(1, **{f'model.{name}': getattr(self, name) for name in sizes})
    if self.num_heads % self.num_kv_heads:
      raise errors.UserError(
        f'model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}'
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on: a seqio Task's `train` split, prepared once; `validation` judges."""

  task: str = 'stdlib'  # a key of data.tasks.TASKS with options, or a registered seqio Task
  vocabulary: str = 'bytes'  # or latin, t5, or the path of a SentencePiece model
  train_files: str = ''  # glob of files, plain or compressed: text, jsonl, needles
  validation_files: str = ''  # likewise
  tfds_directory: str = ''  # where TensorFlow Datasets are; '': where TFDS itself looks
  directory: str = '~/.cache/lex_fire'  # where prepared streams are kept; each is made once
  streaming: bool = False  # training reads the Task as it goes, instead of a prepared stream
  length: int = 256  # of a training window [tokens]
  batch_size: int = 8  # windows a step, over all devices
  # Attention within documents only, whose positions restart at 0; rows of as many questions as fit.
  isolate_documents: bool = False
  mask_rate: float = 0.15  # of tokens that a bidirectional model restores; unused by a causal one
  position_range: int = 0  # positions are drawn from this many, and sorted; 0: they count from 0

  def __post_init__(self):
    _at_least(1, **{'data.length': self.length, 'data.batch_size': self.batch_size})
    _check(0 < self.mask_rate < 1, 'above 0 and below 1', **{'data.mask_rate': self.mask_rate})
    if self.position_range and self.position_range < self.length:
      raise errors.UserError(
        f'data.position_range={self.position_range} must be 0 or at least data.length={self.length}'
      )
    _at_least(0, **{'data.position_range': self.position_range})

  def spec(self, *splits: str) -> spec_lib.Spec:
    """Returns what names the Task, with no files but those of the splits.

    Raises:
      errors.UserError: if a task over files lacks those of a split.
    """
    globs = {'train': self.train_files, 'validation': self.validation_files}
    lacking = [split for split in splits if not globs.get(split)]
    if self.task in spec_lib.FILE_TASKS and lacking:
      raise errors.UserError(
        f'data.task={self.task!r} needs a glob of files for each split, not '
        f'data.{lacking[0]}_files={globs.get(lacking[0], "")!r}'
      )
    files = {split: globs[split] for split in splits if globs.get(split)}
    return spec_lib.Spec(self.task, self.vocabulary, files or None, self.tfds_directory)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW; the learning rate warms up linearly and falls on a cosine until the last step."""

  learning_rate: float = 1e-3  # at the end of the warmup
  warmup_steps: int = 100
  final_fraction: float = 0.1  # of learning_rate, at the last step
  encoding_rate: float = 1.0  # multiple of it at which the encoding's arrays learn
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # of matrices; norms, biases and encodings do not decay
  clip_norm: float = 1.0  # of the whole gradient

  def __post_init__(self):
    for name in ('learning_rate', 'encoding_rate', 'epsilon', 'clip_norm'):
      value = getattr(self, name)
      _check(0 < value < math.inf, 'above 0', **{f'optimizer.{name}': value})
    for name in ('beta1', 'beta2'):
      value = getattr(self, name)
      _check(0 <= value < 1, 'at least 0 and below 1', **{f'optimizer.{name}': value})
    final = self.final_fraction
    _check(0 <= final <= 1, 'at least 0 and at most 1', **{'optimizer.final_fraction': final})
    decay = self.weight_decay
    _check(0 <= decay < math.inf, 'at least 0', **{'optimizer.weight_decay': decay})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices by axis; see sharding.make_mesh."""

  replica: int = -1  # devices that share a batch and hold all parameters each; -1: all others
  fsdp: int = 1  # devices that share both a batch and the parameters
  sequence: int = 1  # devices that share the tokens of each window
  tensor: int = 1  # devices that share heads, the width of MLPs and the vocabulary


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The course of a run."""

  steps: int = 1000
  accumulation: int = 1  # parts that a batch is computed in, one after another; divides batch_size
  seed: int = 0  # of parameters and of the order of windows
  start_from: str = ''  # the workdir of a run whose newest parameters are the first; '': drawn
  non_finite: str = 'stop'  # what a step does whose loss or gradient is not; or 'skip': nothing
  log_every: int = 10  # steps
  checkpoint_every: int = 100  # steps; the validation loss is measured and the state saved
  validation_windows: int = 64  # at most this many, the same each time
  keep_latest: int = 2  # checkpoints
  keep_best: int = 1  # checkpoints, by validation loss

  def __post_init__(self):
    others = ('seed', 'start_from', 'non_finite')
    names = [field.name for field in dataclasses.fields(self) if field.name not in others]
    if self.non_finite not in ('stop', 'skip'):
      raise errors.UserError(f"train.non_finite={self.non_finite!r} must be 'stop' or 'skip'")
    _check(0 <= self.seed < 2**32, 'from 0 to 2**32 - 1', **{'train.seed': self.seed})
    _at_least(1, **{f'train.{name}': getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Defaults of `python -m lex_fire.evaluate`; its flags override them."""

  lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # [tokens]
  protocol: str = 'same_tokens'  # a key of data.protocols.PROTOCOLS
  max_tokens: int = 65_536  # scored at each length
  masks: tuple[str, ...] = (AS_TRAINED,)  # or names of kernels.mask.parse, compared
  encodings: tuple[str, ...] = (AS_TRAINED,)  # or texts of EncodingConfig.replaced_by, compared
  attention: str = AS_TRAINED  # or a key of kernels.IMPLEMENTATIONS, or auto
  stride: int = 0  # by which a window moves on, a divisor of each length [tokens]; 0: the length
  documents: str = ''  # the Task whose documents are scored; '': the run's own
  split: str = 'validation'  # of it
  files: str = ''  # glob of that split's files, for documents of text and jsonl
  tfds_directory: str = ''  # where TensorFlow Datasets are; '': data.tfds_directory
  sequence: int = 1  # devices that share the tokens of each window, for lengths too long for one
  checkpoint: str = LATEST  # or BEST, of the lowest validation loss; or a step

  def __post_init__(self):
    protocols.get(self.protocol)
    known = self.checkpoint in (LATEST, BEST) or str(self.checkpoint).isdecimal()
    _check(known, f'{LATEST}, {BEST} or a step', **{'evaluate.checkpoint': self.checkpoint})
    _at_least(0, **{'evaluate.stride': self.stride})
    _at_least(1, **{'evaluate.max_tokens': self.max_tokens, 'evaluate.sequence': self.sequence})
    whole = all(type(length) is int and length > 0 for length in self.lengths)
    if not whole or len(set(self.lengths)) != len(self.lengths) or not self.lengths:
      raise errors.UserError(
        f'evaluate.lengths={self.lengths} must be one or more different whole numbers above 0'
      )
    for length in self.lengths:
      _at_least(1, **{'evaluate.lengths': length})
      ring.check_length(length, self.sequence, 'evaluate.lengths')
    for name in ('masks', 'encodings'):
      texts = getattr(self, name)
      if not texts or not all(isinstance(text, str) for text in texts):
        raise errors.UserError(f'evaluate.{name}={texts} must be one or more names')
    _choice('evaluate.attention', self.attention, (AS_TRAINED, 'auto', *kernels.IMPLEMENTATIONS))

  def named_masks(self, causal: bool, train_length: int) -> dict[str, kernels.Mask]:
    """Returns the masks by name for a model.

    Args:
      causal: whether the model is.
      train_length: of its training windows [tokens].

    Raises:
      errors.UserError: for a name that is none, a mask that the model was not trained for, or one
        mask named twice.
    """
    own = 'causal' if causal else 'full'
    named: dict[str, kernels.Mask] = {}
    for name in (own if text == AS_TRAINED else text for text in self.masks):
      mask = mask_lib.parse(name, train_length)
      if mask.causal != causal:
        raise errors.UserError(
          f'mask {name!r} needs a model of model.causal={mask.causal}, but this is one of '
          f'model.causal={causal}; use mask {own!r}'
        )
      _once('masks', self.masks, name, mask, named)
    return named

  def named_encodings(
    self, trained: EncodingConfig, train_length: int
  ) -> dict[str, EncodingConfig]:
    """Returns the encodings by what they were asked as; see EncodingConfig.replaced_by.

    Raises:
      errors.UserError: as EncodingConfig.replaced_by and make do, or for one named twice.
    """
    named: dict[str, EncodingConfig] = {}
    for text in self.encodings:
      encoding = trained.replaced_by(text, train_length)
      encoding.make()  # refuses a value that is out of its range
      _once('encodings', self.encodings, text, encoding, named)
    return named


def _once(field: str, texts: Sequence[str], text: str, value: Any, named: dict[str, Any]) -> None:
  """Adds text and value to `named`, unless another text stands for that value there."""
  if value in named.values():
    raise errors.UserError(
      f'evaluate.{field}={", ".join(texts)} compares {text!r} with itself; name each once'
    )
  named[text] = value


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run; its JSON lies in the workdir, and all that follows is made from it."""

  model: ModelConfig = ModelConfig()
  encoding: EncodingConfig = EncodingConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  evaluate: EvaluateConfig = EvaluateConfig()

  def __post_init__(self):
    self._check_encoding(self.encoding.make())
    if not 0 <= self.optimizer.warmup_steps < self.train.steps:
      raise errors.UserError(
        f'optimizer.warmup_steps={self.optimizer.warmup_steps} must be at least 0 and below '
        f'train.steps={self.train.steps}'
      )
    if self.data.batch_size % self.train.accumulation:
      raise errors.UserError(
        f'train.accumulation={self.train.accumulation} must divide '
        f'data.batch_size={self.data.batch_size}'
      )

  def _check_encoding(self, encoding: encodings.Encoding) -> None:
    """Refuses what the run's encoding, or one to be evaluated in its place, cannot serve."""
    c = self.data
    if encoding.max_length is not None and c.length > encoding.max_length:
      raise errors.UserError(
        f'data.length={c.length} is past the {encoding.max_length} positions of encoding '
        f'{encoding.name!r}; shorten it or raise encoding.max_length'
      )
    if encoding.max_length is not None and c.position_range > encoding.max_length:
      raise errors.UserError(
        f'data.position_range={c.position_range} is past the {encoding.max_length} '
        f'positions of encoding {encoding.name!r}; lower it or raise encoding.max_length'
      )
    for name, mask in self.evaluate.named_masks(self.model.causal, c.length).items():
      if c.position_range and mask.reach is not None:
        raise errors.UserError(
          f'mask {name!r} counts positions, of which data.position_range={c.position_range} leaves '
          'out most; use causal or full'
        )
    asked = self.evaluate.named_encodings(self.encoding, c.length)
    for used in (encoding, *(other.make() for other in asked.values())):
      self._check_used(used)

  def _check_used(self, encoding: encodings.Encoding) -> None:
    if not self.model.causal and not encoding.bidirectional:
      raise errors.UserError(
        f'model.causal=False, but encoding {encoding.name!r} with these options cannot tell keys '
        'after the query apart; use encoding.bidirectional=True if it has that option, or another'
      )
    if encoding.log_decay is not None:
      widest = decay.widest(encoding.log_decay(self.model.head_dim))
      if self.data.position_range > widest:
        raise errors.UserError(
          f'data.position_range={self.data.position_range} is past {widest}: one tile of attention '
          f'could span more positions than the decay of encoding {encoding.name!r} can in float32; '
          'lower it'
        )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'Config':
    """Makes a Config from nested mappings: a ConfigDict, or the workdir's JSON.

    >>> Config.from_dict(Config().to_dict()) == Config()
    True

    Raises:
      errors.UserError: for an unknown or missing key, a value of another type, or out of range.
    """
    sections: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    for section, fields in values.items():
      if not hasattr(fields, 'keys'):  # a dict, or a ConfigDict, which is no Mapping
        raise errors.UserError(f'config section {section!r} must have fields, not be {fields!r}')
    _check_keys('', values, sections)
    made = {
      name: _section(name, default, values[name])
      for name, default in sections.items()
      if name != 'encoding'
    }
    options = dict(values['encoding'])
    name = options.pop('name', None)
    return cls(**made, encoding=EncodingConfig(name, tuple(sorted(options.items()))))

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'Config':
    """Makes a Config of what `to_dict` returned once, with fields that have come since added.

    They are at their defaults: a new field's default is what was done before it. Those that were
    called otherwise are renamed.

    Raises:
      errors.UserError: as from_dict does.
    """
    defaults = cls().to_dict()
    encoding: Any = values.get('encoding')
    name = str(encoding['name']) if hasattr(encoding, 'keys') and 'name' in encoding else ''
    defaults['encoding'] = encodings.options(name) if name in encodings.ENCODINGS else {}
    values = _as_said_now(values)
    completed = {
      section: fields | values[section]
      for section, fields in defaults.items()
      if isinstance(values.get(section), dict)
    }
    return cls.from_dict({**values, **completed})

  def to_dict(self) -> dict[str, Any]:
    """Returns nested dicts of values for JSON (a tuple is a list there); `from_dict` reads both."""
    values = dataclasses.asdict(self)
    values['encoding'] = {'name': self.encoding.name, **dict(self.encoding.options)}
    return values


def _as_said_now(values: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a config's fields and values by the names that they have now."""
  mesh: Any = values.get('mesh')
  if hasattr(mesh, 'keys') and 'data' in mesh:  # what replica was called
    renamed = {'replica' if axis == 'data' else axis: size for axis, size in mesh.items()}
    values = {**values, 'mesh': renamed}
  model: Any = values.get('model')
  if hasattr(model, 'keys') and isinstance(model.get('remat'), bool):  # whether of whole blocks
    remat = 'block' if model['remat'] else 'none'
    values = {**values, 'model': {**model, 'remat': remat}}
  return values


def _check_keys(prefix: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
  for key in values:
    if key not in known:
      raise errors.UserError(f'unknown config key {prefix + key!r}; known: {", ".join(known)}')
  for key in known:
    if key not in values:
      raise errors.UserError(f'config key {prefix + key!r} is missing')


def _section(section: str, default: Any, values: Mapping[str, Any]) -> Any:
  """Makes a dataclass like `default`; an int is taken for a float, a list for a tuple."""
  kinds: dict[str, type[Any]] = {
    field.name: type(getattr(default, field.name)) for field in dataclasses.fields(default)
  }
  _check_keys(f'{section}.', values, kinds)
  made: dict[str, Any] = {}
  for key, value in values.items():
    kind = kinds[key]
    if (kind, type(value)) in ((float, int), (tuple, list)):
      value = kind(value)
    if type(value) is not kind:
      raise errors.UserError(f'{section}.{key}={value!r} must be of type {kind.__name__}')
    made[key] = value
  return dataclasses.replace(default, **made)
