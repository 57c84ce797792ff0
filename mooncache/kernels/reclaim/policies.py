"""The traits of all policies, each found by its name in the file that declares them."""

from importlib import import_module

from mooncache.kernels.enums import Policy
from mooncache.kernels.reclaim.traits import Traits

TRAITS: dict[Policy, Traits] = {
    policy: import_module(f"{__package__}.{policy.name.lower()}").TRAITS for policy in Policy
}


def traits_of(policy: str) -> Traits:
    """Return the traits of the policy of that name."""
    return TRAITS[Policy[policy.upper()]]
