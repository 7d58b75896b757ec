package consul

import (
	"time"

	"kedge/kv"
)

// SetEarlierAfter says when a presence ends what earlier processes of its name left.
func SetEarlierAfter(s kv.Store, d time.Duration) { s.(*Store).earlierAfter = d }
