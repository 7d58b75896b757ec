package deployments

// Step is one line of the chain of a decision: what was looked at, and what it said as a code.
type Step struct {
	What   string `json:"what"`             // "node pin", "record", "admission", "quarantine", …
	Reason Reason `json:"reason,omitempty"` // empty: there is none of it
	Facts  Facts  `json:"facts,omitempty"`
	// Decides marks the step that decided, Blocks one that stands in the way of what was decided.
	Decides bool `json:"decides,omitempty"`
	Blocks  bool `json:"blocks,omitempty"`
}

// StepStatus is a Step in words, as an agent's status and kedge explain show it.
type StepStatus struct {
	What    string `json:"what"`
	Says    string `json:"says"`
	Reason  Reason `json:"reason,omitempty"`
	Facts   Facts  `json:"facts,omitempty"`
	Decides bool   `json:"decides,omitempty"`
	Blocks  bool   `json:"blocks,omitempty"`
	// Hint says what an operator can do about it, where there is something.
	Hint string `json:"hint,omitempty"`
}
