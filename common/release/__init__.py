"""What both sides must agree on about a release: the sites' signed verdicts, and the signed record that marks a bundle as released."""
