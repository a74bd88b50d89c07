"""The ground floor: data, models, training, attacks on inputs, metrics. Knows no attack, no defense, no Hydra."""

# Part of every stage's identity: goes up when a change in bench/engine can change a figure.
ENGINE_VERSION = 2
