package backend

import (
	"fmt"

	"kedge/kv"
)

// TooMuchError is the error of a list that was given up because more than kv.MaxListBytes is stored below its prefix.
// It is a kv.ErrTooLarge, and also a kv.ErrUnavailable: what was known before stays in force.
type TooMuchError struct {
	// Prefix is the prefix that was listed, without the store's own. Sample is the key below Prefix at which the bound
	// was exceeded.
	Prefix, Sample string
}

func (e *TooMuchError) Error() string {
	return fmt.Sprintf("more than %d MiB are stored below %s, at %s among others, and are not read: remove the keys that "+
		"don't belong there; until then an agent or mirror that runs goes on with what it last read",
		kv.MaxListBytes(e.Prefix)>>20, e.Prefix, e.Sample)
}

func (e *TooMuchError) Is(target error) bool {
	return target == kv.ErrUnavailable || target == kv.ErrTooLarge
}

// ListLimit bounds the entries of a list by kv.MaxListBytes. Make it with NewListLimit.
type ListLimit struct {
	prefix string
	left   int
}

// NewListLimit returns the limit for the entries below a prefix.
func NewListLimit(prefix string) *ListLimit { return &ListLimit{prefix, kv.MaxListBytes(prefix)} }

// Add counts an entry. It returns a TooMuchError once the entries exceed the limit.
func (r *ListLimit) Add(e kv.Entry) error {
	if r.left -= e.Size(); r.left < 0 {
		return &TooMuchError{r.prefix, e.Key}
	}
	return nil
}
