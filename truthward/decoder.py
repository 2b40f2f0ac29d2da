"""A lean forward pass for sampling with models of the Llama family, on plain tensor operations.

Rows that began together form a :class:`Block`: their prompts are computed once each and without padding, their keys and
values lie in one preallocated cache, and all of them write to the same column of it. Columns between a short prompt's end
and the longest prompt's stay masked; a row's rotary positions skip them. Rows that have ended are overwritten by later
ones, so that a block's live rows are always its first. Blocks of different age step together: the products see all rows
at once, only attention goes block by block. Keys lie transposed, as both products of attention then read straight on.

Shapes: N rows, D width, H heads, K key-value heads, E head width, T prompt positions, S cached positions, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truthward import products
from truthward.products import Product

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
ROTARIES = ("default", "linear", "llama3", "yarn")  # those whose frequencies don't change with the length
QUERY, KEY, VALUE, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


class Layer(NamedTuple):
    """The weights of a layer."""

    before_attention: Tensor
    query_key_value: Product
    attention_out: Product
    before_mlp: Tensor
    gate_up: Product
    down: Product


@dataclass
class Block:
    """Rows that began together.

    Attributes:
        keys: ``[layers, N, K, E, capacity]``.
        values: ``[layers, N, K, capacity, E]``.
        mask: 0 where a column counts, -inf where not ``[N, K, 1, capacity]``.
        positions: of each row's next token ``[N]``.
        filled: columns in use.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    positions: Tensor
    filled: int

    def __len__(self) -> int:
        return len(self.positions)

    def keep(self, alive: Tensor) -> Tensor:
        """Drop the rows that are not ``alive`` ``[N]`` (bool); returns the old index of each row that is left."""
        count = int(alive.sum())
        order = torch.arange(len(alive), device=alive.device)
        holes, movers = order[:count][~alive[:count]], order[count:][alive[count:]]
        order[holes] = movers
        order = order[:count]
        self.keys[:, holes, ..., : self.filled] = self.keys[:, movers, ..., : self.filled]
        self.values[:, holes, :, : self.filled] = self.values[:, movers, :, : self.filled]
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]
        self.mask, self.positions = self.mask[order], self.positions[order]
        return order

    def attend(self, layer: int, query_key_value: Tensor, heads: int, scale: float) -> Tensor:
        """Write the newest column of a layer's cache and attend to all: ``[N, H + 2K, E] -> [N, H, E]``."""
        rows, kv, width, _ = self.keys[layer].shape
        query, key, value = query_key_value.split([heads, kv, kv], 1)
        self.keys[layer, ..., self.filled] = key
        self.values[layer, :, :, self.filled] = value
        seen = self.filled + 1
        keys = self.keys[layer].flatten(0, 1)[..., :seen]
        values = self.values[layer].flatten(0, 1)[:, :seen]
        mask = self.mask.flatten(0, 1)[..., :seen]
        grouped = query.reshape(rows * kv, heads // kv, width)
        weights = torch.baddbmm(mask, grouped, keys, alpha=scale).softmax(-1)
        return torch.bmm(weights, values).view(rows, heads, width)


class Decoder:
    """A chat model's weights, laid out for sampling. Two ways to make one: :meth:`share` and :meth:`pack`.

    Args:
        shell: a causal LM of the family. Its configuration, norms and rotary frequencies are used.
        matrix: name of a linear layer -> its product; asked for in the order of the layers.
        joined: names of linear layers with one input -> one product of all.
        embeddings: the embeddings of words, asked for last.
        dtype: of everything but the matrices.
    """

    blocks = 4  # rows are split into this many; attention then reads less padding, and rows join in fours of a batch

    def __init__(
        self,
        shell: Any,
        matrix: Callable[[str], Product],
        joined: Callable[[Sequence[str]], Product],
        embeddings: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> None:
        config, inner = shell.config, shell.model
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.scale, self.epsilon, self.dtype = self.width**-0.5, config.rms_norm_eps, dtype
        self.device = inner.norm.weight.device
        self.rotary, self.table = inner.rotary_emb, (torch.empty(0, 1, self.width),) * 2
        self.layers = []
        for i, layer in enumerate(inner.layers):
            at = f"model.layers.{i}."
            self.layers.append(
                Layer(
                    layer.input_layernorm.weight.to(dtype),
                    joined([at + QUERY, at + KEY, at + VALUE]),
                    matrix(at + OUT),
                    layer.post_attention_layernorm.weight.to(dtype),
                    joined([at + GATE, at + UP]),
                    matrix(at + DOWN),
                )
            )
        self.norm, self.head = inner.norm.weight.to(dtype), matrix("lm_head")
        self.embeddings = embeddings()

    @classmethod
    def share(cls, model: Any) -> Decoder:
        """A decoder that reads a plain model's weights where they lie: nothing is copied, and later changes show."""

        def matrix(name: str) -> Product:
            linear = model.get_submodule(name)
            return products.shared(linear.weight, linear.bias)

        def joined(names: Sequence[str]) -> Product:
            return products.side_by_side([matrix(name) for name in names])

        return cls(model, matrix, joined, lambda: model.model.embed_tokens.weight, model.dtype)

    @classmethod
    @torch.no_grad()
    def pack(cls, shell: Any, weights: Iterable[tuple[str, Tensor]], precision: str) -> Decoder:
        """A decoder with reordered weights of its own.

        Args:
            shell: a model whose linear layers may be wrapped by adapters.
            weights: (name, weight) of linear layers and embeddings that differ from the shell's, best in the order of the
                layers: then one layer at a time is held twice.
            precision: "exact" (in the type of ``weights``; linear layers that they don't name are shared), "bfloat16", or
                "int8" with everything between the products in fp32.

        Raises:
            ValueError: no such precision.
            UserError: the machine can't do it.
        """
        makers = {"exact": products.packed, "bfloat16": products.bfloat16, "int8": products.int8}
        if precision not in makers:
            raise ValueError(f"precision must be one of {products.PRECISIONS}, not {precision!r}")
        make, given = makers[precision], _Given(weights)

        def find(name: str) -> tuple[Tensor, Tensor | None, bool]:
            linear = shell.get_submodule(name)
            linear = getattr(linear, "base_layer", linear)
            weight = given.take(name)
            return linear.weight if weight is None else weight, linear.bias, weight is None

        def matrix(name: str) -> Product:
            weight, bias, own = find(name)
            return products.shared(weight, bias) if own and precision == "exact" else make(weight, bias)

        def joined(names: Sequence[str]) -> Product:
            parts = [find(name) for name in names]
            if precision == "exact" and all(own for _, _, own in parts):
                return products.side_by_side([products.shared(weight, bias) for weight, bias, _ in parts])
            biases = [bias for _, bias, _ in parts if bias is not None]
            return make(torch.cat([weight for weight, _, _ in parts]), torch.cat(biases) if biases else None)

        def embeddings() -> Tensor:
            weight = given.take("model.embed_tokens")
            return shell.model.embed_tokens.weight if weight is None else weight

        own = given.dtype or shell.dtype
        dtype = {"exact": own, "bfloat16": torch.bfloat16, "int8": torch.float32}[precision]
        return cls(shell, matrix, joined, embeddings, dtype)

    def prefill(self, prompts: list[list[int]], limit: int) -> tuple[Block, Tensor]:
        """Begin rows. Equal prompts are computed once and their keys and values copied.

        Args:
            prompts: token ids, none empty.
            limit: how many tokens may follow.

        Returns:
            the block, and the logits of each row's first token ``[N, V]``.
        """
        once = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(once)}
        rows = torch.tensor([place[tuple(p)] for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in once], device=self.device)
        longest = max(map(len, once))
        column = torch.arange(longest, device=self.device)
        real = (column < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)  # of [prompts * T]
        spot = column.repeat(len(once))[real]
        block = self._block(lengths[rows], longest, limit)

        def attend(i: int, query_key_value: Tensor) -> Tensor:
            """Causal attention within each prompt, padded on the right, where nothing that counts can see."""
            padded = query_key_value.new_zeros(len(once) * longest, *query_key_value.shape[1:])
            padded[real] = query_key_value
            padded = padded.view(len(once), longest, -1, self.width).transpose(1, 2)
            query, key, value = padded.split([self.heads, self.kv, self.kv], 1)
            block.keys[i, ..., :longest] = key.transpose(-1, -2)[rows]
            block.values[i, :, :, :longest] = value[rows]
            group = self.heads // self.kv
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
            return out.transpose(1, 2).flatten(0, 1)[real]

        ids = torch.tensor([t for prompt in once for t in prompt], device=self.device)
        hidden = self._forward(ids, spot, attend)
        return block, self._logits(hidden[lengths.cumsum(0) - 1])[rows]

    def step(self, blocks: Sequence[Block], tokens: Tensor) -> Tensor:
        """Append one token to each row of each block, in order ``[N]``; returns the logits of the next ``[N, V]``."""
        sizes = [len(block) for block in blocks]

        def attend(i: int, query_key_value: Tensor) -> Tensor:
            parts = zip(blocks, query_key_value.split(sizes), strict=True)
            return torch.cat([block.attend(i, part, self.heads, self.scale) for block, part in parts])

        hidden = self._forward(tokens, torch.cat([block.positions for block in blocks]), attend)
        for block in blocks:
            block.filled += 1
            block.positions = block.positions + 1
        return self._logits(hidden)

    def _forward(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Token ids and positions ``[N]`` -> hidden states ``[N, D]`` before the last norm."""
        cosine, sine = self._rotation(positions)
        turning = self.heads + self.kv
        hidden = F.embedding(ids, self.embeddings).to(self.dtype)
        for i, layer in enumerate(self.layers):
            heads = layer.query_key_value(self._normalise(hidden, layer.before_attention)).view(len(ids), -1, self.width)
            turned = heads[:, :turning]
            turned = torch.addcmul(turned * cosine, turned.roll(self.width // 2, -1), sine)
            attended = attend(i, torch.cat([turned, heads[:, turning:]], 1))
            hidden = hidden + layer.attention_out(attended.flatten(1))
            gate, up = layer.gate_up(self._normalise(hidden, layer.before_mlp)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self._normalise(hidden, self.norm))

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.epsilon)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine ``[N, 1, E]``: x turned = x cos + (x rolled by half a head) sin."""
        needed = int(positions.max()) + 1
        if needed > len(self.table[0]):
            places = torch.arange(2 * needed, device=self.device).unsqueeze(0)
            cosine, sine = (t[0].unsqueeze(1) for t in self.rotary(torch.zeros(1, device=self.device), places))
            sine = torch.cat([-sine[..., : self.width // 2], sine[..., self.width // 2 :]], -1)
            self.table = cosine.to(self.dtype), sine.to(self.dtype)
        return self.table[0][positions], self.table[1][positions]

    def _block(self, lengths: Tensor, longest: int, limit: int) -> Block:
        rows, depth, capacity = len(lengths), len(self.layers), longest + limit
        empty: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        columns = torch.arange(capacity, device=self.device)
        gap = (columns >= lengths.unsqueeze(1)) & (columns < longest)
        mask = torch.zeros(rows, capacity, **empty).masked_fill_(gap, float("-inf"))
        return Block(
            torch.empty(depth, rows, self.kv, self.width, capacity, **empty),
            torch.empty(depth, rows, self.kv, capacity, self.width, **empty),
            mask[:, None, None].repeat(1, self.kv, 1, 1),
            lengths.clone(),
            longest,
        )


class _Given:
    """Weights by name, drawn from an iterator only as far as needed."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.rest, self.drawn = iter(weights), dict[str, Tensor]()
        first = next(self.rest, None)
        self.dtype = None if first is None else first[1].dtype
        self.drawn |= {} if first is None else {first[0]: first[1]}

    def take(self, name: str) -> Tensor | None:
        while name not in self.drawn:
            drawn = next(self.rest, None)
            if drawn is None:
                return None
            self.drawn[drawn[0]] = drawn[1]
        return self.drawn.pop(name)


def supports(model: Any) -> bool:
    """Whether :class:`Decoder` computes this model: its family, its activation and its kind of rotation, plain layers."""
    if type(model).__name__ not in FAMILY:
        return False
    config = model.config
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windows = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = windows or (config.model_type == "mistral" and config.sliding_window)
    return config.hidden_act == "silu" and rotary in ROTARIES and not window and not hasattr(model, "hf_device_map")


def is_plain(model: Any) -> bool:
    """Whether its linear layers hold plain weights, with nothing wrapped around them."""
    wanted = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)
    return all(
        type(m) in (nn.Linear, products.Linear) for n, m in model.named_modules() if n.endswith(wanted) or n == "lm_head"
    )


def plain_copy(shell: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
    """A model of any architecture with plain weights in place of adapters; what ``weights`` doesn't name is shared."""
    shared = {id(t): t for t in (*shell.parameters(), *shell.buffers())}
    model = copy.deepcopy(shell, shared)
    for name, weight in weights:
        module = model.get_submodule(name)
        module = getattr(module, "base_layer", module)
        module.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, module)
    return model.eval()
