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
	// maxWaiting bounds the spans that wait for the collector, maxSent those of one request.
	maxWaiting = 2048
	maxSent    = 256
	// sendEvery is how long spans wait for others, and lastWithin how long sending the last spans may take when Run ends.
	sendEvery  = time.Second
	lastWithin = 2 * time.Second
	// maxRetry is the longest average of the pauses between tries to send: one pause may be twice as long.
	maxRetry = 30 * time.Second
)

// Sender sends spans. A nil Sender accepts spans and drops them.
type Sender struct {
	c      Config
	client *http.Client
	log    *slog.Logger
	queued wait.Signal // set when spans were added

	mu      sync.Mutex
	waiting []Span
	dropped int

	warnings rate.Sometimes // bounds the lines about a collector that is unavailable or refuses spans
}

// New returns a sender, whose Run sends the spans; nil if the configuration names no collector.
func New(c Config, log *slog.Logger) *Sender {
	if c.URL == "" {
		return nil
	}
	return &Sender{
		c: c, log: log, queued: wait.NewSignal(), warnings: rate.Sometimes{First: 1, Interval: 10 * time.Minute},
		// A redirect would send the headers, which may contain a token, elsewhere.
		client: &http.Client{Timeout: c.Within, CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		}},
	}
}

// Add queues spans. It never blocks; beyond maxWaiting it drops the oldest, down to three quarters of maxWaiting.
func (s *Sender) Add(spans ...Span) {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.waiting = append(s.waiting, spans...)
	if len(s.waiting) > maxWaiting { // drop many at a time, as each drop copies the rest
		over := len(s.waiting) - maxWaiting*3/4
		s.waiting = append([]Span(nil), s.waiting[over:]...)
		s.dropped += over
	}
	s.mu.Unlock()
	s.queued.Set()
}

// Run sends until ctx ends, and then sends the remaining spans, for at most lastWithin and until the first error.
func (s *Sender) Run(ctx context.Context) {
	if s == nil {
		return
	}
	retry := wait.NewBackoff(sendEvery, maxRetry)
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWithin)
			defer cancel()
			for s.send(last) == nil && s.left() > 0 {
			}
			return
		case <-s.queued.C():
		}
		_ = wait.For(ctx, sendEvery)
		for ctx.Err() == nil && s.left() > 0 {
			err := s.send(ctx)
			if err == nil {
				retry.Reset()
				continue
			}
			if ctx.Err() == nil {
				s.warnings.Do(func() {
					s.log.Warn("could not send trace spans: trying again, and dropping the oldest if too many wait",
						"url", safetext.URLs(s.c.URL), "error", err)
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

// send sends one batch of the queued spans. If it returns an error, the batch stays queued. A batch that the collector
// refuses for good is dropped.
func (s *Sender) send(ctx context.Context) error {
	s.mu.Lock()
	batch := append([]Span(nil), s.waiting[:min(len(s.waiting), maxSent)]...)
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
	_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10)) // so that the connection is reused
	answer.Body.Close()
	switch code := answer.StatusCode; {
	case code == http.StatusTooManyRequests, code == http.StatusBadGateway, code == http.StatusServiceUnavailable,
		code == http.StatusGatewayTimeout:
		return fmt.Errorf("the collector answers %s", answer.Status)
	case code/100 != 2:
		s.warnings.Do(func() {
			s.log.Warn("the collector refused trace spans: they are dropped",
				"url", safetext.URLs(s.c.URL), "answer", answer.Status)
		})
	}
	s.mu.Lock()
	// Spans that were dropped meanwhile were the oldest, and so part of this batch.
	s.waiting = s.waiting[max(0, len(batch)-(s.dropped-dropped)):]
	s.mu.Unlock()
	return nil
}
