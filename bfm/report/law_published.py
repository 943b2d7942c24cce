"""What arXiv 2606.05257 found, which stands beside our laws.

Retail events, 600 runs, C from 1e15 to 1e19; read off its text, so a digit is approximate. It gives no intervals.
"""

from __future__ import annotations

SOURCE = "arXiv 2606.05257"
TEXTS = {
    ("joint", "N_exponent"): ".617 by loss, .57-.66 over metrics",
    ("joint", "D_exponent"): ".383",
    ("joint", "D/N"): "344 at 10\u00b9\u2075 to 36 at 10\u00b9\u2079",
    ("joint", "share_exponent"): "about 0: nearly constant in C",
    ("joint", "s_opt"): "1.1 % to 3.7 %, about 2 %",
    ("joint", "negatives_exponent"): "above 0",
    ("joint", "negatives_beta"): "about 1.2 by loss, .4-.56 by ranking metrics",
    ("joint", "K_opt"): "at 10\u00b9\u2077: 1M by loss, 65k by recall@10",
    ("batch", "overhead20"): "about 570 sequences by loss and recall@10, 200-275 by NDCG@10 and MRR@10",
    ("agreement", "recall@10"): "+.93 at 10\u00b9\u2075 to -1.00 at 10\u00b9\u2078",
}
"""By law and parameter, optimum or metric."""
EXPONENTS = {"params": 0.617}
"""Of an axis' optimum in C."""
RANGES = {"share": (0.011, 0.037)}
"""Where an axis' optimum is at every C."""
