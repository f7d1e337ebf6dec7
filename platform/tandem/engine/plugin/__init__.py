"""What Tandem adds to SGLang on every device: resuming a request elsewhere, ending all of a dead gateway's requests,
showing progress. Switched on by TANDEM_ENGINE=1, which the launcher sets; see docs/decisions/0016-engine-plug-in.md."""
