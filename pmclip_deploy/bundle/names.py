"""The names of a bundle's files and graphs."""

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it; the manifest holds the hashes of all other files
SIGNATURE = "manifest.sig"  # of signing; a bundle may have one, and what is written anew has none
TOKENIZER = "tokenizer.json"
WORDS = "words.json"  # the tokenizer of a head that reads words
LABELS = "labels.npy"  # (N, D) f32, the embeddings of Manifest.labels
QUESTION_EMBEDDINGS = "asked.npy"  # (N, D) f32, the embeddings of Manifest.asked
PROBES = "probes.npy"  # (N, D + 1) f32, of each of Manifest.probes the weights of the image's embedding, and a number to add
SIGNATURES = "seen.npy"  # (N, 32) u8, signatures of the pictures that the image tower learned from (train/lookalikes.py); optional
GRAPHS = ("image", "text", "features", "head", "labels", "findings")  # the towers always; the others where something needs them
NEEDED_BY = {"labels": "labels need", "findings": "findings need"}  # the others by the head
HEADS = ("lite", "mevf", "qcr")  # kinds of head
MAX_MANIFEST_BYTES = 16 << 20
NEXT_STEP = "copy the bundle again, or rebuild it with `pmclip-deploy export`"
