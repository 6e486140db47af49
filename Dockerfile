# The image holds the static binary and the certificate authorities that it checks PostgreSQL's and the
# JWKS's certificates against. No shell, no package manager, no root.
FROM golang:1.26.8-alpine AS build
WORKDIR /src

# The modules change less often than the code: a layer of their own.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
RUN CGO_ENABLED=0 go build -trimpath -o /taskflow .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /taskflow /taskflow

# By number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 65532:65532

# Anything but development is production: JSON logs, all interfaces, no development tokens.
ENV ENVIRONMENT=production
EXPOSE 8000

# /health, not /ready: a restart does not repair a database that is away.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s --retries=3 \
    CMD ["/taskflow", "healthcheck"]
ENTRYPOINT ["/taskflow"]
