"""The codec alone, in a federated loop of your own: NumPy arrays in, bytes out, and back.

Ten lines around whatever moves the bytes: Flower's `Array(..., data=payload)`, an NVFlare filter,
APPFL, a file. Run it: `python examples/codec_only.py`.
"""

import numpy as np

import fedmap_sparse as fs

rng = np.random.default_rng(0)
weights = {
    "hidden.weight": rng.standard_normal((256, 784), dtype=np.float32),
    "hidden.bias": np.zeros(256, np.float32),
    "out.weight": rng.standard_normal((10, 256), dtype=np.float32),
}

# Sender: keep the 10% of largest magnitude in each matrix; everything else travels whole.
masks = {
    name: np.abs(w) >= np.quantile(np.abs(w), 0.9) for name, w in weights.items() if w.ndim == 2
}
payload = fs.encode_state_dict(weights, masks, num_samples=600, meta={"loss": 0.3})

# Receiver: it says what it expects (names, shapes, dtypes); anything else is a FormatError.
expected = {name: np.empty_like(w) for name, w in weights.items()}
received = fs.decode_state_dict(payload, like=expected)

# Once the receiver has the masks, they need not travel again.
smaller = fs.encode_state_dict(weights, masks, mask_section="none")
again = fs.decode_state_dict(smaller, like=expected, masks=masks)

for name, w in weights.items():
    kept = w * masks[name] if name in masks else w
    assert np.array_equal(received[name], kept)
    assert np.array_equal(again[name], kept)
dense = sum(w.nbytes for w in weights.values())
print(f"dense {dense:,} bytes, first message {len(payload):,}, then {len(smaller):,}")
