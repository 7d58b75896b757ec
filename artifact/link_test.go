package artifact

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

const (
	linkDelay = 10 * time.Millisecond // each way
	linkRate  = 50 << 20              // bytes a second that all connections share, each way
)

// link is where to connect to, and what it has passed on of the server's bytes.
type link struct {
	address string
	sent    atomic.Int64
}

// slowLink passes connections on to a server as a link of linkDelay and linkRate would.
func slowLink(tb testing.TB, server string) *link {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { listener.Close() })
	l := &link{address: listener.Addr().String()}
	down, up := rate.NewLimiter(linkRate, 256<<10), rate.NewLimiter(linkRate, 256<<10)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				time.Sleep(2 * linkDelay) // the handshake's round trip
				to, err := net.Dial("tcp", server)
				if err != nil {
					client.Close()
					return
				}
				go delayed(to, client, up, new(atomic.Int64))
				delayed(client, to, down, &l.sent)
			}()
		}
	}()
	return l
}

// delayed copies what it reads, later, counts it, and closes both ends.
func delayed(to, from net.Conn, limit *rate.Limiter, count *atomic.Int64) {
	type packet struct {
		data []byte
		due  time.Time
	}
	packets := make(chan packet, 64) // of up to 64 KiB: more than is on its way at any time
	go func() {
		defer close(packets)
		for {
			data := make([]byte, 64<<10)
			n, err := from.Read(data)
			if n > 0 {
				limit.WaitN(context.Background(), n)
				packets <- packet{data[:n], time.Now().Add(linkDelay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range packets {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			break
		}
		count.Add(int64(len(p.data)))
	}
	to.Close()
	from.Close()
	for range packets { // lets the reader end
	}
}
