package object

import (
	"context"
	"fmt"
	"io"
	"time"
)

// limitChunk is how many bytes are read between two checks of the bandwidth limit.
const limitChunk = 256 << 10

// meter returns a reader of r that counts what is read, enforces the bandwidth limit, and ends a read that stalls.
func (c *Client) meter(ctx context.Context, r io.ReadCloser) *metered {
	return &metered{client: c, ctx: ctx, r: r}
}

type metered struct {
	client *Client
	ctx    context.Context
	r      io.ReadCloser
	stall  *time.Timer
	left   time.Duration // time left for the rest of the current stallLeast bytes
	since  int           // how many of the current stallLeast bytes have come

	limited time.Duration // how long the bandwidth limit has delayed reads
}

func (m *metered) Close() error { return m.r.Close() }

func (m *metered) Read(p []byte) (int, error) {
	if m.client.limit != nil && len(p) > limitChunk {
		p = p[:limitChunk]
	}
	start := time.Now()
	if m.stall == nil {
		m.left = m.client.stall
		m.stall = time.AfterFunc(m.left, func() { m.r.Close() })
	} else {
		m.stall.Reset(m.left)
	}
	n, err := m.r.Read(p)
	if !m.stall.Stop() && err != nil {
		err = fmt.Errorf("the server stalled for %v", m.client.stall)
	}
	if m.since += n; m.since >= stallLeast {
		m.since, m.left = 0, m.client.stall
	} else {
		m.left = max(0, m.left-time.Since(start))
	}
	m.client.bytes.Add(int64(n))
	if m.client.limit != nil && n > 0 {
		began := time.Now()
		err := m.client.limit.WaitN(m.ctx, n)
		m.limited += time.Since(began)
		if err != nil {
			return n, err
		}
	}
	return n, err
}
