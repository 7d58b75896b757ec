package deployments

// Step is one step of a decision: what was looked at, and the result as a code.
type Step struct {
	What   string `json:"what"`             // "node pin", "record", "admission", "quarantine", …
	Reason Reason `json:"reason,omitempty"` // empty: nothing was found
	Facts  Facts  `json:"facts,omitempty"`
	// Decides marks the step that decided. Blocks marks a step that stands in the way of the decision.
	Decides bool `json:"decides,omitempty"`
	Blocks  bool `json:"blocks,omitempty"`
}

// StepStatus is a Step in words, as an agent's status and kedge explain show it.
type StepStatus struct {
	What    string `json:"what"`
	Message string `json:"says"`
	Reason  Reason `json:"reason,omitempty"`
	Facts   Facts  `json:"facts,omitempty"`
	Decides bool   `json:"decides,omitempty"`
	Blocks  bool   `json:"blocks,omitempty"`
	// Hint says what an operator can do about it; may be empty.
	Hint string `json:"hint,omitempty"`
}
