// Package tracetest is an OpenTelemetry collector for tests: any request but OTLP over HTTP in JSON fails the test.
package tracetest

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"kedge/sync/trace"
)

// Span is a span as the collector received it. Service is its sender's service.name, Err its message if it failed.
type Span struct {
	Trace, ID, Parent, Name, Service, Err string
	Start, End                            time.Time
	Attributes                            map[string]string
}

// Collector is a collector's HTTP server.
type Collector struct {
	// URL is the endpoint for traces.
	URL string

	mu    sync.Mutex
	spans []Span
}

// New starts a collector, which runs until the test ends.
func New(t testing.TB) *Collector {
	t.Helper()
	c := new(Collector)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		spans, err := decode(r)
		if err != nil {
			t.Errorf("the collector got a request that isn't OTLP: %v", err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		c.spans = append(c.spans, spans...)
		c.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, "{}")
	}))
	t.Cleanup(server.Close)
	c.URL = server.URL + "/v1/traces"
	return c
}

// Sender returns a sender to the collector, which runs until the test ends.
func (c *Collector) Sender(t testing.TB) *trace.Sender {
	s := trace.New(trace.Config{URL: c.URL, Within: time.Minute,
		Resource: []trace.Attribute{{Key: "service.name", Value: "test"}}}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

// Await returns the collector's spans once they satisfy a condition; after a minute it fails the test.
func (c *Collector) Await(t testing.TB, enough func([]Span) bool) []Span {
	t.Helper()
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		c.mu.Lock()
		spans := slices.Clone(c.spans)
		c.mu.Unlock()
		if enough(spans) {
			return spans
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("the collector has only %+v", spans)
		}
	}
}

// Named returns the spans with a name.
func Named(spans []Span, name string) []Span {
	return slices.DeleteFunc(slices.Clone(spans), func(s Span) bool { return s.Name != name })
}

// The part of opentelemetry-proto 1.x's message ExportTraceServiceRequest that the collector accepts, in its JSON form.
type (
	value     struct{ StringValue string }
	attribute struct {
		Key   string
		Value value
	}
	span struct {
		TraceID, SpanID, ParentSpanID, TraceState, Name string
		Flags, Kind                                     int
		StartTimeUnixNano, EndTimeUnixNano              string
		Attributes                                      []attribute
		Status                                          struct {
			Code    int
			Message string
		}
	}
	request struct {
		ResourceSpans []struct {
			Resource   struct{ Attributes []attribute }
			ScopeSpans []struct {
				Scope struct{ Name, Version string }
				Spans []span
			}
		}
	}
)

func decode(r *http.Request) (spans []Span, err error) {
	if r.Method != http.MethodPost || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/json" {
		return nil, fmt.Errorf("%s %s of %q", r.Method, r.URL.Path, r.Header.Get("Content-Type"))
	}
	var got request
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		return nil, err
	}
	for _, resource := range got.ResourceSpans {
		service := ""
		for _, a := range resource.Resource.Attributes {
			if a.Key == "service.name" {
				service = a.Value.StringValue
			}
		}
		for _, scope := range resource.ScopeSpans {
			for _, s := range scope.Spans {
				one, err := check(s)
				if err != nil {
					return nil, fmt.Errorf("%+v: %w", s, err)
				}
				one.Service = service
				spans = append(spans, one)
			}
		}
	}
	return spans, nil
}

// check converts a span. It returns an error if the specification forbids its ids, times, kind or name.
func check(s span) (Span, error) {
	one := Span{Trace: s.TraceID, ID: s.SpanID, Parent: s.ParentSpanID, Name: s.Name, Attributes: map[string]string{}}
	for _, id := range []struct {
		name, text string
		size       int
	}{{"traceId", s.TraceID, 16}, {"spanId", s.SpanID, 8}, {"parentSpanId", s.ParentSpanID, 8}} {
		raw, err := hex.DecodeString(id.text)
		root := id.text == "" && s.ParentSpanID == "" && id.size == 8 && s.SpanID != ""
		if err != nil || len(raw) != id.size && !root {
			return one, fmt.Errorf("%s %q: want %d bytes in hex", id.name, id.text, id.size)
		}
	}
	start, err := strconv.ParseInt(s.StartTimeUnixNano, 10, 64)
	if err != nil {
		return one, err
	}
	end, err := strconv.ParseInt(s.EndTimeUnixNano, 10, 64)
	if err != nil || end < start {
		return one, fmt.Errorf("it ends at %s: %v", s.EndTimeUnixNano, err)
	}
	one.Start, one.End = time.Unix(0, start), time.Unix(0, end)
	for _, a := range s.Attributes {
		one.Attributes[a.Key] = a.Value.StringValue
	}
	if s.Status.Code == 2 {
		one.Err = s.Status.Message
	}
	if s.Kind < 1 || s.Kind > 5 || s.Name == "" {
		return one, fmt.Errorf("kind %d, name %q", s.Kind, s.Name)
	}
	return one, nil
}
