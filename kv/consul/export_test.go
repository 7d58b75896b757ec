package consul

import (
	"context"
	"net"
	"time"

	"kedge/kv"
)

// SetEndOthersAfter says when a presence ends what earlier processes of its name left.
func SetEndOthersAfter(s kv.Store, d time.Duration) { s.(*Store).endOthersAfter = d }

// SetPresenceCheckAfter says how often a presence looks after its entries.
func SetPresenceCheckAfter(s kv.Store, d time.Duration) { s.(*Store).presenceCheckAfter = d }

// Dial opens a connection as a store's requests do.
func Dial(ctx context.Context, address string) (net.Conn, error) {
	return newTransport().DialContext(ctx, "tcp", address)
}
