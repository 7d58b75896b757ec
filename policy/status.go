package policy

import (
	"cmp"
	"encoding/json"
	"time"

	"kedge/deployments"
)

// NodeStatus is the JSON of an agent's /status: all that the agent knows of its node. It is declared here so that its
// readers need not link the agent.
type NodeStatus struct {
	Node    string    `json:"node"`
	Stage   string    `json:"stage"`
	Agent   string    `json:"agent"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	// Messages say what keeps the node from being ready, by ROLE/UNIT, ROLE or, while the agent starts, the word agent.
	Messages map[string]string             `json:"messages,omitempty"`
	Sources  []SourceStatus                `json:"sources"`
	Roles    map[string]deployments.Report `json:"roles"`
	// Decisions are by ROLE/UNIT.
	Decisions map[string]DecisionStatus `json:"decisions"`
}

// SourceStatus is the state of the agent's view of one prefix.
type SourceStatus struct {
	Prefix string    `json:"prefix"`
	From   string    `json:"from"` // one of: store, last known state, snapshot, nothing yet
	Since  time.Time `json:"since,omitzero"`
	// Error is why the view of the store may be out of date, and ErrorSince is when that error began.
	Error      string    `json:"error,omitempty"`
	ErrorSince time.Time `json:"error_since,omitzero"`
}

// UnmarshalJSON also reads Error and ErrorSince under the JSON names that the previous version used.
func (s *SourceStatus) UnmarshalJSON(data []byte) error {
	type plain SourceStatus
	var both struct {
		plain
		Trouble      string    `json:"trouble"`
		TroubleSince time.Time `json:"trouble_since"`
	}
	if err := json.Unmarshal(data, &both); err != nil {
		return err
	}
	*s = SourceStatus(both.plain)
	s.Error = cmp.Or(s.Error, both.Trouble)
	if s.ErrorSince.IsZero() {
		s.ErrorSince = both.TroubleSince
	}
	return nil
}

// DecisionStatus is a Decision as JSON.
type DecisionStatus struct {
	Action   Action                   `json:"action"`
	Target   deployments.Pointer      `json:"target,omitzero"`
	Stage    deployments.Pointer      `json:"stage,omitzero"`
	Source   Source                   `json:"source"`
	Reason   deployments.Reason       `json:"reason,omitempty"`
	Facts    deployments.Facts        `json:"facts,omitempty"`
	Message  string                   `json:"message"` // Reason and Facts in words
	Invalid  string                   `json:"invalid,omitempty"`
	Recheck  time.Time                `json:"recheck,omitzero"`
	WaitsFor string                   `json:"waits,omitempty"` // the unit that has to converge before this one, and why
	Trace    []deployments.StepStatus `json:"trace,omitempty"`
}

// UnmarshalJSON also reads Message under the JSON name that the previous version used.
func (s *DecisionStatus) UnmarshalJSON(data []byte) error {
	type plain DecisionStatus
	var both struct {
		plain
		Why string `json:"why"`
	}
	if err := json.Unmarshal(data, &both); err != nil {
		return err
	}
	*s = DecisionStatus(both.plain)
	s.Message = cmp.Or(s.Message, both.Why)
	return nil
}
