# %% [markdown]
# # A new model every month, and the models behind it stay
#
# Somebody has trained a churn model on the vectors of last month's run. This month's run learns anew, and its vectors
# lie in a space of their own, which the churn model cannot read. `profiles.align_to` turns them into the old space. Run
# the file, or open it as a notebook; `data=synthetic` behind the command takes a made-up shop.

# %%
import sys
from datetime import datetime, timedelta, timezone

import lightgbm
import numpy as np
from sklearn.metrics import roc_auc_score

import ubp_fast
from ubp_fast.evaluation import build_targets
from ubp_fast.events.read import EventDirectory
from ubp_fast.profiles import Profiles

settings = ["data=complete_journey", *sys.argv[1:]]
whole = ubp_fast.run([*settings, "stages=[events]", "directory=runs/retraining/events"])
end = datetime.fromtimestamp(EventDirectory.open(whole / "stages" / "events").split.end_s, timezone.utc)
last_month = (end - timedelta(days=28)).strftime("%Y-%m-%dT%H:%M:%S")

# %% [markdown]
# Last month: the log ended four weeks earlier. The new run begins with other random numbers, too.

# %%
old = ubp_fast.run([*settings, f"data.end={last_month}", "stages=[profiles]", "directory=runs/retraining/old"])
new = ubp_fast.run(
    [*settings, "seed=1", f"profiles.align_to={old}", "stages=[profiles]", "directory=runs/retraining/new"]
)


# %% [markdown]
# The churn model knows last month only.


# %%
def stops(run, profiles):
    """Who is asked about (bool per client), and who of them buys nothing in the two weeks after the vectors' day."""
    task = build_targets(EventDirectory.open(run / "stages" / "events"), profiles.client_ids, ["churn"]).tasks["churn"]
    return task.included, task.train.dense()[task.included, 0]


learned_from = Profiles.load(old / "profiles")
rows, stopped = stops(old, learned_from)
options = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 7, "feature_fraction": 0.3, "verbose": -1}
options |= {"seed": 0, "deterministic": True, "num_threads": 1}
known = lightgbm.Dataset(learned_from.embeddings[rows].astype("float32"), stopped)
model = lightgbm.train(options, known, num_boost_round=100)

# %% [markdown]
# Which vectors of this month it can read: those of the old model, embedded today; the new model's, turned into the old
# space; the new model's as they are. Beside the AUROC, how well its predictions agree with those from the old vectors.

# %%
stacking = new / "stages" / "stacking"
predicted, auroc, agreement = {}, {}, {}
for name, folder in {"old model": "old_model", "new, aligned": "stacked", "new, as it is": "unaligned"}.items():
    vectors = Profiles.load(stacking / folder)
    rows, stops_now = stops(new, vectors)
    predicted[name] = model.predict(vectors.embeddings[rows].astype("float32"))
    auroc[name] = roc_auc_score(stops_now, predicted[name])
    agreement[name] = np.corrcoef(predicted["old model"], predicted[name])[0, 1]
    print(f"AUROC {auroc[name]:.4f}  correlation {agreement[name]:.3f}  {name}")
