"""The selectors that CADS is compared with, one module each, all under the same contract and ledger."""
