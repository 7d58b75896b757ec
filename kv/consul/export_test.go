package consul

import (
	"context"
	"net"
	"time"

	"kedge/kv"
)

// SetEarlierAfter says when a presence ends what earlier processes of its name left.
func SetEarlierAfter(s kv.Store, d time.Duration) { s.(*Store).endEarlierAfter = d }

// SetPresencePoll says how often a presence looks after its entries.
func SetPresencePoll(s kv.Store, d time.Duration) { s.(*Store).presencePoll = d }

// Dial opens a connection as a store's requests do.
func Dial(ctx context.Context, address string) (net.Conn, error) {
	return newTransport().DialContext(ctx, "tcp", address)
}
