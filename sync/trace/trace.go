// Package trace sends spans to an OpenTelemetry collector: they show a push's way from the mirror to its last node.
//
// The KV store contains nothing of a trace. The mirror and every agent derive the ids of a push's
// trace, and of its root span, from the unit, the commit and the release of a pin. Spans are sent
// as OTLP over HTTP, in JSON, which every collector accepts at port 4318. What can't be sent in
// time is dropped: a collector never holds up a deployment.
package trace

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// ID is the id of a trace, SpanID that of a span.
type (
	ID     [16]byte
	SpanID [8]byte
)

// Context identifies a trace and a span in it.
type Context struct {
	Trace ID
	Span  SpanID
}

// IsZero reports whether c identifies no span: nothing is traced then.
func (c Context) IsZero() bool { return c == Context{} }

// Of returns the context of the root span of a push's trace, which a unit and a commit identify. A pin has its own
// trace, even if the commit is the same: pin is the digest of its release, and zero for a push.
func Of(id deployments.UnitID, commit string, pin deployments.Digest) Context {
	text := "kedge trace\x00" + id.String() + "\x00" + commit
	if !pin.IsZero() {
		text += "\x00" + pin.String()
	}
	sum := sha256.Sum256([]byte(text))
	return Context{ID(sum[:16]), SpanID(sum[16:24])}
}

// New returns the context of a new span in c's trace.
func (c Context) New() Context {
	_, _ = rand.Read(c.Span[:]) // never fails
	return c
}

// Span is a timed operation.
type Span struct {
	Context
	Parent     SpanID // zero: the span is its trace's root
	Name       string
	Start, End time.Time
	Attributes []Attribute
	// Err is why the operation failed; nil: it didn't. It is sent as it would be logged: without the secrets of URLs.
	Err error
}

// Attribute is a fact of a span or its sender. A value is sent without the secrets of URLs, and cut to maxValue bytes.
type Attribute struct{ Key, Value string }

const (
	maxValue      = 256     // bytes of an attribute's value
	maxError      = 1 << 10 // bytes of a span's error
	defaultWithin = 10 * time.Second
)

// Config says where spans are sent.
type Config struct {
	// URL is the collector's endpoint for traces; empty: nothing is traced.
	URL     string
	Headers map[string]string
	// Within bounds one request; 0: there is no bound.
	Within time.Duration
	// Resource has the attributes of the sender: service.name and those in the environment.
	Resource []Attribute
}

// FromEnvironment reads OpenTelemetry's own variables; an invalid one is an error. If they name no collector or switch
// tracing off, the Config is zero. service is the program's name if neither OTEL_SERVICE_NAME nor service.name in
// OTEL_RESOURCE_ATTRIBUTES is set. If both are set, OTEL_SERVICE_NAME counts.
func FromEnvironment(getenv func(string) string, service string) (Config, error) {
	first := func(names ...string) string {
		for _, name := range names {
			if v := strings.TrimSpace(getenv(name)); v != "" {
				return v
			}
		}
		return ""
	}
	if strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true") || first("OTEL_TRACES_EXPORTER") == "none" {
		return Config{}, nil
	}
	c := Config{URL: first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), Headers: map[string]string{}, Within: defaultWithin}
	wanted := "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: want a whole http or https URL, as in http://127.0.0.1:4318/v1/traces"
	if base := first("OTEL_EXPORTER_OTLP_ENDPOINT"); c.URL == "" && base != "" {
		c.URL = strings.TrimSuffix(base, "/") + "/v1/traces"
		wanted = "OTEL_EXPORTER_OTLP_ENDPOINT: want http://HOST:PORT or https://HOST:PORT, as in http://127.0.0.1:4318"
	}
	if c.URL == "" {
		return Config{}, nil
	}
	if u, err := url.Parse(c.URL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return c, errors.New(wanted)
	}
	if p := first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"); p == "grpc" {
		return c, errors.New("OTEL_EXPORTER_OTLP_PROTOCOL grpc: kedge speaks http/json, at the collector's port 4318")
	}
	headers, err := pairs(first("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"))
	if err != nil {
		return c, errors.New("OTEL_EXPORTER_OTLP_HEADERS: want NAME=VALUE,…") // not shown, as the values may be secrets
	}
	for _, h := range headers {
		c.Headers[h.Key] = h.Value
	}
	if v := first("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"); v != "" {
		if c.Within, err = time.ParseDuration(v + "ms"); err != nil || c.Within <= 0 {
			return c, fmt.Errorf("OTEL_EXPORTER_OTLP_TIMEOUT %q: want milliseconds, as in 10000", v)
		}
	}
	extra, err := pairs(first("OTEL_RESOURCE_ATTRIBUTES"))
	if err != nil {
		return c, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	for _, a := range extra {
		if a.Key == "service.name" {
			service = cmp.Or(a.Value, service)
		} else {
			c.Resource = append(c.Resource, a)
		}
	}
	c.Resource = append(c.Resource, Attribute{"service.name", cmp.Or(first("OTEL_SERVICE_NAME"), service)})
	return c, nil
}

// pairs parses NAME=VALUE,NAME=VALUE with percent-encoded values.
func pairs(text string) (all []Attribute, err error) {
	for pair := range strings.SplitSeq(text, ",") {
		if pair = strings.TrimSpace(pair); pair == "" {
			continue
		}
		name, value, ok := strings.Cut(pair, "=")
		name = strings.TrimSpace(name)
		if value, err = url.PathUnescape(strings.TrimSpace(value)); !ok || err != nil || name == "" {
			return nil, fmt.Errorf("%q: want NAME=VALUE", safetext.Clip(pair, 80))
		}
		all = append(all, Attribute{name, value})
	}
	return all, nil
}

// OTLP's JSON: opentelemetry-proto's ExportTraceServiceRequest. Ids are in hex, and 64-bit numbers are strings.
type (
	jsonRequest struct {
		ResourceSpans []jsonResource `json:"resourceSpans"`
	}
	jsonResource struct {
		Resource   jsonAttributes `json:"resource"`
		ScopeSpans []jsonScope    `json:"scopeSpans"`
	}
	jsonScope struct {
		Scope struct {
			Name string `json:"name"`
		} `json:"scope"`
		Spans []jsonSpan `json:"spans"`
	}
	jsonAttributes struct {
		Attributes []jsonAttribute `json:"attributes,omitempty"`
	}
	jsonAttribute struct {
		Key   string `json:"key"`
		Value struct {
			StringValue string `json:"stringValue"`
		} `json:"value"`
	}
	jsonSpan struct {
		TraceID           string `json:"traceId"`
		SpanID            string `json:"spanId"`
		ParentSpanID      string `json:"parentSpanId,omitempty"`
		Name              string `json:"name"`
		Kind              int    `json:"kind"`
		StartTimeUnixNano string `json:"startTimeUnixNano"`
		EndTimeUnixNano   string `json:"endTimeUnixNano"`
		jsonAttributes
		Status *jsonStatus `json:"status,omitempty"`
	}
	jsonStatus struct {
		Code    int    `json:"code"`
		Message string `json:"message,omitempty"`
	}
)

const (
	kindInternal = 1
	statusError  = 2
)

func attributesOf(all []Attribute) (a jsonAttributes) {
	for _, from := range all {
		to := jsonAttribute{Key: from.Key}
		to.Value.StringValue = safetext.Line(safetext.URLs(from.Value), maxValue)
		a.Attributes = append(a.Attributes, to)
	}
	return a
}

func spanOf(s Span) jsonSpan {
	j := jsonSpan{
		TraceID: hex.EncodeToString(s.Trace[:]), SpanID: hex.EncodeToString(s.Span[:]), Name: s.Name, Kind: kindInternal,
		StartTimeUnixNano: fmt.Sprint(s.Start.UnixNano()), EndTimeUnixNano: fmt.Sprint(s.End.UnixNano()),
		jsonAttributes: attributesOf(s.Attributes),
	}
	if s.Parent != (SpanID{}) {
		j.ParentSpanID = hex.EncodeToString(s.Parent[:])
	}
	if s.Err != nil {
		j.Status = &jsonStatus{statusError, safetext.Line(safetext.URLs(s.Err.Error()), maxError)}
	}
	return j
}
