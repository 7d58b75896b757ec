package object_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"kedge/artifact/object"
)

// s3Stub answers as S3 does, where no server at hand does.
func s3Stub(t *testing.T, serve http.HandlerFunc, change ...func(*object.Config)) *object.Client {
	server := httptest.NewServer(serve)
	t.Cleanup(server.Close)
	c := object.Config{
		S3: &object.S3Config{Endpoint: server.URL, Region: "us-east-1", AccessKey: "kedge-test", SecretKey: "x"},
	}
	for _, change := range change {
		change(&c)
	}
	return object.New(c)
}

func s3Fault(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>as told</Message></Error>", code)
}

// S3 says where a bucket is to whom asks elsewhere, even where an answer has no body.
func TestABucketInAnotherRegion(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status int
		code   string
	}{{http.StatusMovedPermanently, "PermanentRedirect"}, {http.StatusBadRequest, "AuthorizationHeaderMalformed"}, {http.StatusMovedPermanently, ""}} {
		client := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Amz-Bucket-Region", "eu-west-1")
			if c.code == "" {
				w.WriteHeader(c.status)
				return
			}
			s3Fault(w, c.status, c.code)
		})
		if _, err := client.Stat(t.Context(), "s3://bucket/x"); err == nil || !strings.Contains(err.Error(), "in region eu-west-1: set AWS_REGION") {
			t.Errorf("%d %s: %v", c.status, c.code, err)
		}
		if requests, _ := client.Requests(); requests != 1 {
			t.Errorf("%d %s: %d requests", c.status, c.code, requests)
		}
	}
}

// Servers other than AWS's have no header for it: they say it in their message.
func TestARegionThatOnlyTheMessageNames(t *testing.T) {
	t.Parallel()
	client := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, "<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; "+
			"the region &#34;us-east-1&#34; is wrong; expecting &#34;eu-central-1&#34;</Message></Error>")
	})
	_, err := client.ReadAll(t.Context(), "s3://bucket/x", 100)
	if err == nil || !strings.Contains(err.Error(), "in region eu-central-1: set AWS_REGION") {
		t.Errorf("%v; want it to name the region and the variable", err)
	}
}

// Of two who write an object at once, S3 may tell one of a conflict before the other is done: that is no more than
// a reason to look again.
func TestAConflictWithAnotherWriter(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	tries := 0
	c := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		io.Copy(io.Discard, r.Body)
		if r.Method == http.MethodPut {
			if tries++; tries == 1 {
				s3Fault(w, http.StatusConflict, "ConditionalRequestConflict")
			}
			return
		}
		s3Fault(w, http.StatusNotFound, "NoSuchKey")
	})
	if err := c.Put(t.Context(), "s3://bucket/x", strings.NewReader("one"), 3, object.PutOptions{}); err != nil || tries != 2 {
		t.Errorf("after %d tries: %v", tries, err)
	}
}

// What one part meets is no reason to send all the others again.
func TestAPartIsTriedAgainAlone(t *testing.T) {
	t.Parallel()
	const size = 16<<20*3 + 1
	var mu sync.Mutex
	sent, uploads, done := map[string]int{}, 0, false
	c := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		io.Copy(io.Discard, r.Body)
		part := r.URL.Query().Get("partNumber")
		switch {
		case r.Method == http.MethodPost && r.URL.Query().Has("uploads"):
			uploads++
			fmt.Fprint(w, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
		case r.Method == http.MethodPut:
			if sent[part]++; sent[part] == 1 && part != "1" {
				s3Fault(w, http.StatusServiceUnavailable, "SlowDown")
				return
			}
			w.Header().Set("ETag", `"`+part+`"`)
		case r.Method == http.MethodPost:
			done = true
			fmt.Fprint(w, "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")
		default:
			s3Fault(w, http.StatusNotFound, "NoSuchKey")
		}
	})
	if err := c.Put(t.Context(), "s3://bucket/x", bytes.NewReader(make([]byte, size)), size, object.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if !done || uploads != 1 || sent["1"] != 1 || sent["2"] != 2 || sent["4"] != 2 {
		t.Errorf("%d uploads, parts sent: %v", uploads, sent)
	}
}
