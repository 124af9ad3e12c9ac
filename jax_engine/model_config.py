"""ModelConfig: the shape of a decoder-only transformer, in our own words.

Each architecture's file in models/ makes one of a checkpoint's config.json, through hf_config.py; layers, cache and
runner read it. What a checkpoint may leave open is decided by then. Never reads a file, never imports jax.
"""

from dataclasses import dataclass, replace

from jax_engine.page_groups import PageGroups

#: Groups of a model's layers where all have windows; there is one more, which costs as much and only keeps token ids.
_GROUPS_WITHOUT_FULL = 8
#: Activation functions of feed-forward layers, by their names in Hugging Face configs; layers/mlp.py has them.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of the layers that share them; every way of scaling ends in these numbers.

    Attributes:
        frequencies: radians per position, one for each pair of rotated head dimensions.
        amplitude: factor of cosine and sine (YaRN and LongRoPE raise it above 1).
        long_frequencies: what LongRoPE takes instead where sequences may be longer than `short_length`.
    """

    frequencies: tuple[float, ...]
    amplitude: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    short_length: int | None = None

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head turn."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What sets a layer apart from the model's other layers.

    Attributes:
        sliding_window: attention sees this many latest positions; None: all.
        rope: index into ModelConfig.ropes; None: no rotary positions.
        sparse: its feed-forward is a mixture of experts.
        recurrent: it keeps a state per sequence instead of keys and values.
    """

    sliding_window: int | None = None
    rope: int | None = 0
    sparse: bool = False
    recurrent: bool = False


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts.

    Attributes:
        experts_per_token: how many experts a token is sent to.
        intermediate_size: width of one expert. shared_size: of the expert that all tokens pass; 0: there is none.
        normalize: the weights of the chosen experts are made to sum to one. scaling: factor of the weights.
        sigmoid: experts are scored one by one, with a correction for their choice; otherwise by a softmax.
        num_groups, groups_per_token: experts are chosen from this many of the groups only.
        shared_gate: the shared expert's result has a factor from the token. router_bias, expert_bias: they have biases.
        swiglu_limit, swiglu_alpha: of gpt-oss's clamped SwiGLU; None: the plain activation.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int = 0
    normalize: bool = True
    scaling: float = 1.0
    sigmoid: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Latent attention: sizes of a head's parts and of what is cached.

    Attributes:
        query_rank: queries too are made of a latent of this size; 0: of the hidden state itself.
        latent_dim: of the latent that keys and values come from.
        nope_dim, rope_dim: of a query's and key's fixed and turning part. value_dim: of a head's value.
    """

    query_rank: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Gated delta nets: key heads, each with a share of the value heads; sizes of a head; width of the convolution."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. The first names are those of Hugging Face configs.

    Attributes:
        ropes: the kinds of rotary positions; layers name them by index.
        layers: one per layer; by default all alike, with full attention.
        attention_scale: factor of the attention scores; by default head_dim ** -0.5.
        attention_bias: of query, key and value. output_bias: of attention's output product. mlp_bias: of feed-forward.
        attention_soft_cap, logits_soft_cap: c in c * tanh(x / c).
        embedding_multiplier: factor of the embeddings. residual_multiplier: of what a layer adds to its input.
        logits_divisor: what the logits are divided by.
        mla: attention is latent; num_key_value_heads and head_dim are then those of the cache.
        delta: what the recurrent layers are.
        mxfp4_experts: the checkpoint has experts in blocks of four-bit numbers; they are unpacked as they are loaded.
        interleaved_rope: the checkpoint stores the two dimensions that turn together side by side.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_word_embeddings: bool = False
    ropes: tuple[Rope, ...] = ()
    layers: tuple[LayerConfig, ...] = ()
    attention_scale: float | None = None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    delta: DeltaConfig | None = None
    mxfp4_experts: bool = False
    interleaved_rope: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (LayerConfig(),) * self.num_hidden_layers)

    @classmethod
    def placeholder(cls, vocab_size: int, max_position_embeddings: int) -> "ModelConfig":
        """A model that nobody runs: all that scheduling needs to know of one."""
        return cls(
            architecture="none",
            vocab_size=vocab_size,
            hidden_size=1,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=1,
            max_position_embeddings=max_position_embeddings,
        )

    @property
    def query_scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def num_recurrent_layers(self) -> int:
        """Layers that keep a state per sequence instead of keys and values.

        Where there are any, a sequence cannot start from another's pages, for these layers' state is not in them.
        """
        return sum(layer.recurrent for layer in self.layers)

    @property
    def layers_per_page(self) -> int:
        """Layers of a group: of whose keys and values a page holds a share.

        All layers where these see the same. Else, so that contexts grow by no more than they must, as many as fill the
        groups of layers that see everything; but not many more than there are layers with windows.
        """
        full, sliding = self._num_layers
        if not sliding:
            return full
        return -(-full // max(1, round(full / sliding))) if full else -(-sliding // _GROUPS_WITHOUT_FULL)

    @property
    def page_groups(self) -> PageGroups:
        """The groups that layers with keys and values form; the last of a kind may have fewer layers than a page has
        room for. Where all layers have windows, the first group has none: its pages keep the token ids."""
        full, sliding = self._num_layers
        if not sliding:
            return PageGroups()
        size = self.layers_per_page
        window = max(layer.sliding_window or 0 for layer in self.layers)
        return PageGroups(max(1, -(-full // size)), -(-sliding // size), window)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each layer, its group and its number in it; of recurrent layers, their number among these."""
        size, num_full, counts = self.layers_per_page, self.page_groups.num_full, [0, 0, 0]
        places = []
        for layer in self.layers:
            kind = 2 if layer.recurrent else int(layer.sliding_window is not None)
            number, counts[kind] = counts[kind], counts[kind] + 1
            places.append((0, number) if kind == 2 else (kind * num_full + number // size, number % size))
        return tuple(places)

    @property
    def _num_layers(self) -> tuple[int, int]:
        """Layers with keys and values: those that see everything, and those with windows."""
        sliding = sum(layer.sliding_window is not None for layer in self.layers)
        return len(self.layers) - self.num_recurrent_layers - sliding, sliding

    def served(self, max_model_len: int) -> "ModelConfig":
        """The model for sequences of at most this length: a window that holds them all is none, and LongRoPE turns by
        other angles where they may be long.

        One choice for the whole run, as a cached key cannot be turned again when its sequence grows past the border.
        """
        ropes = tuple(
            replace(rope, frequencies=rope.long_frequencies)
            if rope.long_frequencies is not None and max_model_len > (rope.short_length or 0)
            else rope
            for rope in self.ropes
        )
        layers = tuple(
            replace(layer, sliding_window=None) if (layer.sliding_window or 0) >= max_model_len else layer
            for layer in self.layers
        )
        return replace(self, ropes=ropes, layers=layers)
