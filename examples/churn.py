# %% [markdown]
# # Who stops buying?
#
# LightGBM on profiles of 2,464 real households, beside the same trees on recency, frequency and variety, which is what
# a shop without profiles would take. The file runs as it is (`python examples/churn.py`) and opens as a notebook, cell
# by cell, in editors that know `# %%`. What stands behind the command goes to the run: `data=synthetic` takes a made-up
# shop.

# %%
import sys

import lightgbm
import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

import ubp_fast
from ubp_fast.evaluation import build_targets
from ubp_fast.events.read import EventDirectory
from ubp_fast.profiles import Profiles

run = ubp_fast.run(["data=complete_journey", "stages=[profiles]", "directory=runs/churn", *sys.argv[1:]])
events, profiles = EventDirectory.open(run / "stages" / "events"), Profiles.load(run / "profiles")

# %% [markdown]
# The profiles end four weeks before the log does. The trees learn who buys nothing in the first two of these weeks, and
# are asked about the other two.

# %%
task = build_targets(events, profiles.client_ids, ["churn"]).tasks["churn"]
rows = np.flatnonzero(task.included)
stopped, stops_next = (labels.take(rows).dense()[:, 0] for labels in (task.train, task.validation))

# %% [markdown]
# What one would take without profiles: days since the newest purchase, purchases in all and in the last four weeks,
# different products.

# %%
cutoff_s = events.split.input_end_s
past = events.scan("product_buy").filter(pl.col("timestamp_s") < cutoff_s).collect()
known = past.group_by("client_id").agg(
    days=(cutoff_s - pl.col("timestamp_s").max()) / 86_400,
    purchases=pl.len(),
    recent=(pl.col("timestamp_s") >= cutoff_s - 28 * 86_400).sum(),
    products=pl.col("sku").n_unique(),
)
clients = pl.DataFrame({"client_id": profiles.client_ids[rows]})
simple = clients.join(known, on="client_id", how="left", maintain_order="left").drop("client_id").to_numpy()
inputs = {"recency, frequency, variety": simple, "profile": profiles.embeddings[rows].astype("float32")}

# %%
options = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 7, "feature_fraction": 0.3, "verbose": -1}
options |= {"seed": 0, "deterministic": True, "num_threads": 1}
trees = {
    name: lightgbm.train(options, lightgbm.Dataset(values, stopped), num_boost_round=100)
    for name, values in inputs.items()
}
auroc = {name: roc_auc_score(stops_next, trees[name].predict(values)) for name, values in inputs.items()}
for name, area in auroc.items():
    print(f"AUROC {area:.4f}  {name}")

# %% [markdown]
# Which blocks of the profile the trees look at.

# %%
gain = trees["profile"].feature_importance("gain")
assert profiles.layout is not None
share = {
    block.name: gain[profiles.layout.columns_of(block.name)].sum() / gain.sum() for block in profiles.layout.blocks
}
for name, part in sorted(share.items(), key=lambda item: -item[1]):
    print(f"{part:6.1%}  {name}")
