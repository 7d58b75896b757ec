package trace_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/sync/trace"
	"kedge/sync/trace/tracetest"
)

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

// The mirror and each agent derive the same ids on their own, and no other push has them.
func TestIDsFollowFromThePush(t *testing.T) {
	t.Parallel()
	// Mirrors and agents of different versions must derive the same id, so it must not change.
	push := trace.Of(app, "c1", deployments.Digest{})
	if fmt.Sprintf("%x %x", push.Trace, push.Span) != "d2aa2bb95241c3e31aac5943879b3ae6 8fc139db1378f702" {
		t.Errorf("the trace of a push is %x, its root %x", push.Trace, push.Span)
	}
	pin := deployments.Digest{1}
	other := app
	other.Unit = "base"
	seen := map[trace.ID]bool{}
	for _, c := range []trace.Context{
		trace.Of(app, "c1", deployments.Digest{}), trace.Of(app, "c2", deployments.Digest{}), trace.Of(app, "c1", pin),
		trace.Of(other, "c1", deployments.Digest{}), trace.Of(app, "c1", deployments.Digest{2}),
	} {
		if seen[c.Trace] || c.IsZero() || c.Span == (trace.SpanID{}) {
			t.Errorf("%x is of two pushes", c.Trace)
		}
		seen[c.Trace] = true
		if n := c.New(); n.Trace != c.Trace || n.Span == c.Span {
			t.Errorf("%v within %v", n, c)
		}
	}
}

func TestFromEnvironment(t *testing.T) {
	t.Parallel()
	const endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318"
	const at, agent = "http://127.0.0.1:4318/v1/traces ", "[{service.name kedge-agent}]"
	for _, c := range []struct{ env, want string }{
		{"", ""},
		{endpoint, at + "map[] 10s " + agent},
		{endpoint + "/; OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20x,a=b; OTEL_EXPORTER_OTLP_TIMEOUT=500",
			at + "map[a:b authorization:Bearer x] 500ms " + agent},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://c.example/t; " + endpoint, "https://c.example/t map[] 10s " + agent},
		{endpoint + "; OTEL_SERVICE_NAME=x; OTEL_RESOURCE_ATTRIBUTES=service.name=y,env=prod",
			at + "map[] 10s [{env prod} {service.name x}]"},
		{endpoint + "; OTEL_RESOURCE_ATTRIBUTES=service.name=y,env=prod", at + "map[] 10s [{env prod} {service.name y}]"},
		{endpoint + "; OTEL_RESOURCE_ATTRIBUTES=service.name=", at + "map[] 10s " + agent},
		{endpoint + "; OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", at + "map[] 10s " + agent},
		{endpoint + "; OTEL_SDK_DISABLED=true", ""},
		{endpoint + "; OTEL_TRACES_EXPORTER=none", ""},
		{"OTEL_EXPORTER_OTLP_HEADERS=s3cret; OTEL_EXPORTER_OTLP_PROTOCOL=grpc", ""},
		{endpoint + "; OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "error: OTEL_EXPORTER_OTLP_PROTOCOL grpc"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=127.0.0.1:4318",
			"error: OTEL_EXPORTER_OTLP_ENDPOINT: want http://HOST:PORT or https://HOST:PORT"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=ftp://x",
			"error: OTEL_EXPORTER_OTLP_ENDPOINT: want http://HOST:PORT or https://HOST:PORT"},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=127.0.0.1:4318; " + endpoint,
			"error: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: want a whole http or https URL, as in http://127.0.0.1:4318/v1/traces"},
		{endpoint + "; OTEL_EXPORTER_OTLP_HEADERS=s3cret", "error: OTEL_EXPORTER_OTLP_HEADERS: want NAME=VALUE"},
		{endpoint + "; OTEL_EXPORTER_OTLP_TIMEOUT=10s", "error: OTEL_EXPORTER_OTLP_TIMEOUT"},
		{endpoint + "; OTEL_RESOURCE_ATTRIBUTES=x", "error: OTEL_RESOURCE_ATTRIBUTES"},
	} {
		vars := map[string]string{}
		for pair := range strings.SplitSeq(c.env, "; ") {
			name, value, _ := strings.Cut(pair, "=")
			vars[name] = value
		}
		conf, err := trace.FromEnvironment(func(name string) string { return vars[name] }, "kedge-agent")
		got := ""
		switch {
		case err != nil:
			got = "error: " + err.Error()
		case conf.URL != "":
			got = fmt.Sprint(conf.URL, " ", conf.Headers, " ", conf.Within, " ", conf.Resource)
		}
		failed := strings.HasPrefix(c.want, "error: ")
		if got != c.want && !(failed && strings.HasPrefix(got, c.want)) || strings.Contains(got, "s3cret") {
			t.Errorf("%s:\n%s, want\n%s", c.env, got, c.want)
		}
	}
}

// A collector gets each span as it was made, without the secrets of URLs.
func TestSends(t *testing.T) {
	t.Parallel()
	c := tracetest.New(t)
	s := c.Sender(t)
	push := trace.Of(app, "c1", deployments.Digest{})
	at := time.Unix(1764000000, 42)
	child := push.New()
	s.Add(trace.Span{Context: push, Name: "push", Start: at, End: at,
		Attributes: []trace.Attribute{{Key: "kedge.release", Value: "https://a.example/m?X-Amz-Signature=s3cret"}}})
	s.Add(trace.Span{Context: child, Parent: push.Span, Name: "deploy", Start: at, End: at.Add(time.Second),
		Err: errors.New("GET https://u:s3cret@a.example/m: 403\x1b[2J")})
	got := c.Await(t, func(spans []tracetest.Span) bool { return len(spans) == 2 })
	id := func(b []byte) string { return fmt.Sprintf("%x", b) }
	if text := fmt.Sprint(got); strings.Contains(text, "s3cret") || strings.ContainsRune(text, 0x1b) {
		t.Errorf("a secret is sent, or a control character: %s", text)
	}
	got[0].Attributes = nil
	want := tracetest.Span{Trace: id(push.Trace[:]), ID: id(push.Span[:]), Name: "push", Service: "test",
		Start: at, End: at}
	if !reflect.DeepEqual(got[0], want) {
		t.Errorf("%+v, want %+v", got[0], want)
	}
	if d := got[1]; d.Parent != id(push.Span[:]) || d.Trace != id(push.Trace[:]) || d.End.Sub(d.Start) != time.Second ||
		!strings.Contains(d.Err, "403") {
		t.Errorf("%+v", d)
	}
}

// A collector that is unavailable, slow or wrong costs only its spans: Add never blocks, and the queue is bounded.
func TestSurvivesItsCollector(t *testing.T) {
	t.Parallel()
	at := time.Unix(1764000000, 0)
	span := trace.Span{Context: trace.Of(app, "c1", deployments.Digest{}), Name: "x", Start: at, End: at}
	var log bytes.Buffer
	for name, answer := range map[string]http.HandlerFunc{
		"hangs": func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		},
		"refuses": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) },
		"redirects": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"is busy": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) },
	} {
		server := httptest.NewServer(answer)
		within := trace.Config{URL: server.URL, Within: 100 * time.Millisecond}
		s := trace.New(within, slog.New(slog.NewTextHandler(&log, nil)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.Run(ctx)
		}()
		for range 10_000 {
			s.Add(span)
		}
		cancel()
		<-done // within lastWithin and a request: Run never waits for more
		server.CloseClientConnections()
		server.Close()
		if log.Len() == 0 && name == "refuses" {
			t.Error("nobody is told that the collector refuses spans")
		}
	}
	var none *trace.Sender
	none.Add(span)
	none.Run(t.Context())
}

// Spans wait for a collector that is unavailable for a while.
func TestSendsAgain(t *testing.T) {
	t.Parallel()
	var tries atomic.Int64
	got := make(chan string, 9)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if tries.Add(1) == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		body, _ := io.ReadAll(r.Body)
		got <- string(body)
	}))
	t.Cleanup(server.Close)
	s := trace.New(trace.Config{URL: server.URL, Within: time.Minute}, slog.New(slog.DiscardHandler))
	go s.Run(t.Context())
	s.Add(trace.Span{Context: trace.Of(app, "c1", deployments.Digest{}), Name: "once",
		Start: time.Unix(1, 0), End: time.Unix(2, 0)})
	if body := <-got; strings.Count(body, `"once"`) != 1 {
		t.Errorf("%s", body)
	}
}
