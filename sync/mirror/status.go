package mirror

import (
	"encoding/json"
	"time"

	"kedge/kv"
)

// Status is the JSON at mirror/state: what the mirror that holds the lease last did. Written by it alone, on change.
type Status struct {
	Holder string    `json:"holder"`
	Head   string    `json:"head"` // the commit that KV holds
	Author string    `json:"author,omitempty"`
	At     time.Time `json:"at"` // when Head was applied
	// Refused is a newer commit that was not taken, and Error why, or what else is wrong (Git is away).
	Refused string `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
	// Rules are those of Head, which the next commit is held to.
	Rules Rules `json:"rules"`
}

// Rules are the settings of a commit that bind the one after it.
type Rules struct {
	AllowRewind bool `json:"allow_rewind,omitempty"`
	MaxRemoved  int  `json:"max_removed"` // percent
}

func rulesOf(l *loaded) Rules {
	return Rules{AllowRewind: l.tree.Settings.AllowRewind, MaxRemoved: l.tree.Settings.MaxRemoved}
}

// maxError bounds Status.Error, in bytes: a commit may have any number of mistakes.
const maxError = 4 << 10

// sameTrouble is how long an error that goes on may change its words (ports, counts, times) before they are written anew.
const sameTrouble = 5 * time.Minute

// worthWriting reports whether next tells more than what was written at the time at. Pure.
func worthWriting(was, next Status, at, now time.Time) bool {
	if was == next {
		return false
	}
	if was.Error != "" && next.Error != "" && next.Refused == "" && now.Sub(at) < sameTrouble {
		was.Error = next.Error
		return was != next
	}
	return true
}

func statusOp(s Status) *kv.Op {
	value, err := json.Marshal(s)
	if err != nil {
		panic(err) // plain data
	}
	op := kv.Put(kv.MirrorKey, value)
	return &op
}

// clip cuts an error's text at a line's end.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[:n]
	for i := len(s) - 1; i > n/2; i-- {
		if s[i] == '\n' {
			return s[:i] + "\n..."
		}
	}
	return s + "..."
}
