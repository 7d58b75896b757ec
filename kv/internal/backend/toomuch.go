package backend

import (
	"fmt"

	"kedge/kv"
)

// TooMuchError is the error of a list that was given up, as more than kv.MostListed is stored below its prefix. It is
// kv.ErrUnavailable, as what was known before goes on to count, and kv.ErrTooLarge.
type TooMuchError struct {
	// Prefix is the prefix that was listed, without the store's own; Sample is a key below it at which there was no
	// room any more.
	Prefix, Sample string
}

func (e *TooMuchError) Error() string {
	return fmt.Sprintf("%v: more than %d MiB are stored below %s, at %s among others: "+
		"remove the keys that don't belong there; until then what was known before counts",
		kv.ErrUnavailable, kv.MostListed(e.Prefix)>>20, e.Prefix, e.Sample)
}

func (e *TooMuchError) Is(target error) bool {
	return target == kv.ErrUnavailable || target == kv.ErrTooLarge
}

// Room is what is left of kv.MostListed while a prefix is listed. Make it with NewRoom.
type Room struct {
	prefix string
	left   int
}

// NewRoom returns the room for the entries below a prefix.
func NewRoom(prefix string) *Room { return &Room{prefix, kv.MostListed(prefix)} }

// Take takes the room of an entry. It returns a TooMuchError if there is none left.
func (r *Room) Take(e kv.Entry) error {
	if r.left -= e.Size(); r.left < 0 {
		return &TooMuchError{r.prefix, e.Key}
	}
	return nil
}
