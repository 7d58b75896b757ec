package deployments

import (
	"cmp"
	"reflect"
	"time"
)

// MirrorState is the JSON at mirror/state: what the mirror that holds the lease did last. Only that
// mirror writes it, when the state changes or the store has lost it.
type MirrorState struct {
	Holder string `json:"holder"`
	// Head is the commit that KV holds, Author its author, and At when it was applied.
	Head   string    `json:"head"`
	Author string    `json:"author,omitempty"`
	At     time.Time `json:"at,omitzero"`
	// Repo is the address of the repository that Head comes from.
	Repo string `json:"repo,omitempty"`
	// Ancestors lists the newest commits that Head descends from: 12 digits of each hash, newest
	// first, separated by spaces. Whoever waits for one of these commits can see from it that the
	// commit was taken.
	Ancestors string `json:"past,omitempty"`
	// Refused is the commit at the branch's head if it was not taken. Error says why, or what else
	// is wrong, for example that Git is away.
	Refused string `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
	// Applying is a commit that is being written in several transactions. KV holds all of Head before the first
	// transaction, and all of Applying after the last. A mirror that takes over goes on with that commit.
	Applying string `json:"applying,omitempty"`
	// Freeze lists the freeze windows of Head's kedge.yaml, for pages and commands that show what
	// is to come.
	Freeze []FreezeWindow `json:"freeze,omitempty"`
	// FreezeOmitted is how many windows Freeze leaves out: see FreezeWindows.
	FreezeOmitted int `json:"freeze_more,omitempty"`
	// Rules are the settings that bind the next commit: those of Applying, or else of Head.
	Rules MirrorRules `json:"rules"`
}

// MirrorRules are the settings of a commit that bind the commit after it.
type MirrorRules struct {
	AllowRewind bool `json:"allow_rewind,omitempty"`
	MaxRemoved  int  `json:"max_removed"` // percent
}

// ParseMirrorState parses mirror/state. Unknown fields are ignored.
func ParseMirrorState(value []byte) (MirrorState, error) {
	var s MirrorState
	err := lenientJSON(value, &s)
	return s, err
}

// Equal reports whether all fields of two states are equal, as reflect.DeepEqual compares them.
func (s MirrorState) Equal(other MirrorState) bool { return reflect.DeepEqual(s, other) }

// LastCommit returns the commit that the mirror took last, whether or not it is fully written; empty: none.
func (s MirrorState) LastCommit() string { return cmp.Or(s.Applying, s.Head) }
