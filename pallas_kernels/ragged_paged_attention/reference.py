"""ragged_paged_attention from the maths, in float64 numpy, one sequence and one head at a time. For tests only.

Called by tests and by tuning runs that check a kernel's answers. It shares no code with the implementations; of the
pool it knows the layout only.
"""

import numpy as np


def write_kv(pool, k, v, ragged, layer, num_pages):
    """The pool after each row's new tokens are written, as a new array; 8 bits hold no more than 448."""
    pool = np.array(pool)
    if pool.dtype.itemsize == 1:
        k, v = (np.clip(np.asarray(x, np.float32), -448, 448) for x in (k, v))
    page_size = pool.shape[3]
    for row, start, end in _rows(ragged):
        first = int(ragged.kv_lens[row]) - (end - start)
        for token in range(start, end):
            page, offset = divmod(first + token - start, page_size)
            index = layer * num_pages + int(ragged.page_table[row, page])
            for head in range(pool.shape[1]):
                pool[index, head, 0, offset] = k[token, head]
                pool[index, head, 1, offset] = v[token, head]
    return pool


def ragged_paged_attention(
    q, pool, ragged, layer, num_pages, *, scale, sliding_window=None, logits_soft_cap=None, sinks=None
):
    """[T, N, H] float32; zero for padding tokens."""
    q, pool = np.asarray(q, np.float64), np.asarray(pool)
    num_heads, num_kv_heads = q.shape[1], pool.shape[1]
    out = np.zeros(q.shape)
    group = num_heads // num_kv_heads
    for row, start, end in _rows(ragged):
        kv_len = int(ragged.kv_lens[row])
        for head in range(num_heads):
            if head % group == 0:
                keys, values = _read(pool, ragged.page_table[row], kv_len, layer * num_pages, head // group)
            for token in range(start, end):
                position = kv_len - (end - token)
                first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                scores = keys[first : position + 1] @ q[token, head] * scale
                if logits_soft_cap is not None:
                    scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
                exponents = scores if sinks is None else np.append(scores, float(sinks[head]))
                weights = np.exp(exponents - exponents.max())
                weights = weights[: len(scores)] / weights.sum()
                out[token, head] = weights @ values[first : position + 1]
    return out.astype(np.float32)


def _rows(ragged):
    starts = np.asarray(ragged.query_starts)
    spans = [(row, int(starts[row]), int(starts[row + 1])) for row in range(len(starts) - 1)]
    return [(row, start, end) for row, start, end in spans if end > start]


def _read(pool, pages, kv_len, first_page, head):
    """Keys and values [kv_len, H] float64 of one row and kv head."""
    pages, page_size = np.asarray(pages), pool.shape[3]
    slots = [divmod(position, page_size) for position in range(kv_len)]
    tiles = [pool[first_page + int(pages[page]), head, :, offset] for page, offset in slots]
    tiles = np.asarray(tiles, np.float64).reshape(kv_len, 2, -1)
    return tiles[:, 0], tiles[:, 1]
