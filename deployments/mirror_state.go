package deployments

import (
	"cmp"
	"time"
)

// MirrorState is the JSON at mirror/state: what the mirror that holds the lease last did. Written by it alone, on
// change.
type MirrorState struct {
	Holder string `json:"holder"`
	// Head is the commit that KV holds, by Author, applied At.
	Head   string    `json:"head"`
	Author string    `json:"author,omitempty"`
	At     time.Time `json:"at,omitzero"`
	// Repo is the address of the repository that Head is of.
	Repo string `json:"repo,omitempty"`
	// Past names, in short and newest first, commits that Head descends from: who waits for one of them sees that
	// it was taken.
	Past string `json:"past,omitempty"`
	// Refused is a newer commit that was not taken, and Error why, or what else is wrong (Git is away).
	Refused string `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
	// Applying is a commit that takes several transactions, while they are under way: Head is whole before, and it
	// after them. A mirror that takes over goes on with it.
	Applying string `json:"applying,omitempty"`
	// Rules are those of Applying, or else of Head, which the next commit is held to.
	Rules MirrorRules `json:"rules"`
}

// MirrorRules are the settings of a commit that bind the one after it.
type MirrorRules struct {
	AllowRewind bool `json:"allow_rewind,omitempty"`
	MaxRemoved  int  `json:"max_removed"` // percent
}

// ParseMirrorState reads mirror/state. Fields that it does not know are passed over.
func ParseMirrorState(value []byte) (MirrorState, error) {
	var s MirrorState
	err := lenientJSON(value, &s)
	return s, err
}

// Taken returns the commit that the mirror took last, whether or not it is fully written.
func (s MirrorState) Taken() string { return cmp.Or(s.Applying, s.Head) }
