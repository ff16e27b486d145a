// Swagger UI over the service's own description. The token comes in the address's fragment, as for the page.

const token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
if (token) history.replaceState(null, "", location.pathname);

window.SwaggerUIBundle?.({
  url: "/openapi.json",
  dom_id: "#swagger",
  validatorUrl: null,
  requestInterceptor: (request) => {
    if (token) request.headers.Authorization = `Bearer ${token}`;
    return request;
  },
});
