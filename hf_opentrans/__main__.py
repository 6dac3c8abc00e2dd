"""`python -m hf_opentrans` is `hf-opentrans`: for `torchrun -m` and `accelerate launch -m`."""

from hf_opentrans.cli import main

if __name__ == "__main__":
    main()
