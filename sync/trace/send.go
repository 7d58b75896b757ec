package trace

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments/safetext"
	"kedge/deployments/wait"
)

const (
	// mostWaiting spans wait for the collector, the newest; mostSent go out in one request.
	mostWaiting = 2048
	mostSent    = 256
	// sendEvery is how long spans wait for others, and lastWithin how long the last ones may take as the program ends.
	sendEvery  = time.Second
	lastWithin = 2 * time.Second
	// patience is the longest pause between tries to send.
	patience = 30 * time.Second
)

// Sender sends spans. A nil Sender takes them and does nothing.
type Sender struct {
	c      Config
	client *http.Client
	log    *slog.Logger
	some   wait.Signal

	mu      sync.Mutex
	waiting []Span
	dropped int

	trouble rate.Sometimes // bounds the lines about a collector that is away
}

// New returns a sender for what Run sends; nil if the configuration names no collector.
func New(c Config, log *slog.Logger) *Sender {
	if c.URL == "" {
		return nil
	}
	return &Sender{
		c: c, log: log, some: wait.NewSignal(), trouble: rate.Sometimes{First: 1, Interval: 10 * time.Minute},
		// A redirect would take the headers, and so a token, elsewhere.
		client: &http.Client{Timeout: c.Within, CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		}},
	}
}

// Add takes spans. It never waits; beyond mostWaiting the oldest quarter is dropped.
func (s *Sender) Add(spans ...Span) {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.waiting = append(s.waiting, spans...)
	if len(s.waiting) > mostWaiting { // many at a time: each drop copies the rest
		over := len(s.waiting) - mostWaiting*3/4
		s.waiting = append([]Span(nil), s.waiting[over:]...)
		s.dropped += over
	}
	s.mu.Unlock()
	s.some.Set()
}

// Run sends until ctx ends, and then what is left, for as long as lastWithin.
func (s *Sender) Run(ctx context.Context) {
	if s == nil {
		return
	}
	retry := wait.NewBackoff(sendEvery, patience)
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWithin)
			defer cancel()
			for s.send(last) == nil && s.left() > 0 {
			}
			return
		case <-s.some.C():
		}
		_ = wait.For(ctx, sendEvery)
		for ctx.Err() == nil && s.left() > 0 {
			err := s.send(ctx)
			if err == nil {
				retry.Reset()
				continue
			}
			if ctx.Err() == nil {
				s.trouble.Do(func() {
					s.log.Warn("the collector takes no spans: the oldest are dropped", "url", safetext.URLs(s.c.URL), "error", err)
				})
			}
			_ = retry.Wait(ctx)
		}
	}
}

func (s *Sender) left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

// send sends some of the spans that wait. An error means that they wait on; what the collector refuses for good is
// dropped.
func (s *Sender) send(ctx context.Context) error {
	s.mu.Lock()
	batch := append([]Span(nil), s.waiting[:min(len(s.waiting), mostSent)]...)
	dropped := s.dropped
	s.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	scope := jsonScope{}
	scope.Scope.Name = "kedge"
	for _, span := range batch {
		scope.Spans = append(scope.Spans, spanOf(span))
	}
	body, err := json.Marshal(jsonRequest{[]jsonResource{{attributesOf(s.c.Resource), []jsonScope{scope}}}})
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.c.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	for name, value := range s.c.Headers {
		r.Header.Set(name, value)
	}
	answer, err := s.client.Do(r)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10)) // so that the connection can be used again
	answer.Body.Close()
	switch code := answer.StatusCode; {
	case code == http.StatusTooManyRequests, code == http.StatusBadGateway, code == http.StatusServiceUnavailable,
		code == http.StatusGatewayTimeout:
		return fmt.Errorf("it answers %s", answer.Status)
	case code/100 != 2:
		s.trouble.Do(func() {
			s.log.Warn("the collector refuses spans", "url", safetext.URLs(s.c.URL), "answer", answer.Status)
		})
	}
	s.mu.Lock()
	// Those that were dropped meanwhile were the oldest, so of this batch.
	s.waiting = s.waiting[max(0, len(batch)-(s.dropped-dropped)):]
	s.mu.Unlock()
	return nil
}
