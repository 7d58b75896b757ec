package mirror

import (
	"cmp"
	"encoding/json"
	"strings"
	"time"

	"kedge/kv"
	"kedge/sync/git"
)

// Status is the JSON at mirror/state: what the mirror that holds the lease last did. Written by it alone, on change.
type Status struct {
	Holder string    `json:"holder"`
	Head   string    `json:"head"` // the commit that KV holds
	Author string    `json:"author,omitempty"`
	At     time.Time `json:"at,omitzero"` // when Head was applied
	// Past names, in short and newest first, commits that Head descends from: who waits for one of them sees that it was taken.
	Past string `json:"past,omitempty"`
	// Refused is a newer commit that was not taken, and Error why, or what else is wrong (Git is away).
	Refused string `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
	// Applying is a commit that takes several transactions, while they are under way: Head is whole before, and it after them.
	// A mirror that takes over goes on with it.
	Applying string `json:"applying,omitempty"`
	// Rules are those of Applying, or else of Head, which the next commit is held to.
	Rules Rules `json:"rules"`
}

// Rules are the settings of a commit that bind the one after it.
type Rules struct {
	AllowRewind bool `json:"allow_rewind,omitempty"`
	MaxRemoved  int  `json:"max_removed"` // percent
}

// taken is the commit that was taken last, written in full or not.
func (s Status) taken() string { return cmp.Or(s.Applying, s.Head) }

func rulesOf(l *git.Commit) Rules {
	return Rules{AllowRewind: l.Tree.Settings.AllowRewind, MaxRemoved: l.Tree.Settings.MaxRemoved}
}

// maxError bounds Status.Error, in bytes: a commit may have any number of mistakes.
const maxError = 4 << 10

// worthWriting reports whether next tells more than was: not where only numbers in the error differ (ports, counts, times), for
// minutes on end. at is when was was written. Pure.
func worthWriting(was, next Status, at, now time.Time) bool {
	if withoutDigits(was.Error) == withoutDigits(next.Error) && now.Sub(at) < sameTrouble {
		was.Error = next.Error
	}
	return was != next
}

const sameTrouble = 5 * time.Minute

func withoutDigits(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, s)
}

// writeStatus puts s at mirror/state.
func writeStatus(s Status) change {
	return change{status: &s, ops: []kv.Op{kv.Put(kv.MirrorKey, encodeStatus(s))}}
}

func encodeStatus(s Status) []byte {
	value, err := json.Marshal(s)
	if err != nil {
		panic(err) // plain data
	}
	return value
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
